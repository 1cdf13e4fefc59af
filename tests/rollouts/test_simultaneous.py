"""Simultaneous generation: its log-probs under one masked forward, its decisions against a row read
alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from recipes.components import DECISION_HEADS
from recipes.compose import compose
from recipes.errors import ConfigError, DataError
from rollouts.layout import additive, from_visible
from rollouts.simultaneous.decision import DecisionHead, Recorder, SimultaneousSampling, State
from rollouts.simultaneous.engine import SimultaneousEngine
from rollouts.streaming.engine import masked_states
from rollouts.trajectory import Request, Sampling

STOP, VOCAB = 1, 40
STARTS = np.arange(VOCAB) % 3 != 0  # so that words have one to several tokens
STARTS[STOP] = True


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.4,
    )
    folder = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    settings = compose(["recipe=proactivellm", f"model.path={folder}", "rollout.batch_size=16"])
    return SimultaneousEngine(str(folder), settings, torch.device("cpu"), torch.float32)


def requests(count: int = 9) -> list[Request]:
    """Ragged ones: 1 to 7 units of 1 to 3 tokens, openings of 1 or 2 tokens."""
    rng, batch = np.random.default_rng(5), []
    for index in range(count):
        lengths = [rng.integers(1, 4) for _ in range(2 + index % 7)]
        segments = tuple(tuple(rng.integers(2, VOCAB, n).tolist()) for n in lengths)
        batch.append(
            Request(
                index,
                0,
                tuple(t for s in segments for t in s),
                seed=index,
                segments=segments,
                opening=((2, 3)[: 1 + index % 2],),
            )
        )
    return batch


def sampling(head, **options) -> Sampling:
    return SimultaneousSampling(
        **{"max_new_tokens": 12, "stop_ids": (STOP,), "head": head, "word_starts": STARTS} | options
    )


def alone(engine, request: Request, options: Sampling) -> tuple[list[int], list[int]]:
    """Tokens and reads of one row, written out: a full masked forward for every proposal,
    greedy."""
    ends = np.cumsum([len(s) for s in request.segments])
    opening = [t for part in request.opening for t in part]
    tokens, reads, read, waited, words = [], [], 1, 1, 0
    while len(tokens) < options.max_new_tokens:
        had = [ends[0]] * len(opening) + [ends[r] for r in reads] + [ends[read]]
        # of one token more: its place is what the last row predicts
        layout = from_visible(ends[-1], had)
        ids = [*request.prompt_ids, *opening, *tokens, 0]
        hidden = masked_states(engine.model, ids, layout)[-2]
        logits = engine.model.lm_head(hidden).float()
        proposal = int(logits.argmax())
        begins = bool(STARTS[proposal]) or not tokens
        state = State(
            logits[None],
            torch.tensor([read]),
            torch.tensor([words if begins else words - 1]),
            torch.tensor([read == len(ends) - 1]),
            torch.tensor([begins or not options.whole_words]),
        )
        if options.head.needs_attention:
            state.attention = by_unit(engine, ids, layout, ends)[:, None]
        lag, fixed = (
            read - int(state.written),
            name_of(options.head) in ("batch", "wait_k", "ratio"),
        )
        write = (
            read == len(ends) - 1
            or (options.whole_words and not begins)
            or (fixed and bool(options.head.writes(state)[0]))
            or (
                not fixed
                and lag >= options.min_lag
                and (
                    bool(options.head.writes(state)[0])
                    or waited >= (options.max_reads or 99)
                    or lag >= (options.max_lag or 99)
                )
            )
        )
        if not write:
            read, waited = read + 1, waited + 1
            continue
        tokens.append(proposal)
        reads.append(read)
        words, waited = words + begins, 0
        if proposal == STOP:
            break
    return tokens, reads


def name_of(head) -> str:
    return next(n for n in DECISION_HEADS if DECISION_HEADS.resolve(n) is type(head))


def by_unit(engine, ids, layout, ends) -> torch.Tensor:
    """[layers, heads, M] attention of the last row but one on each unit, from a masked forward."""
    before = engine.model.config._attn_implementation
    engine.model.set_attn_implementation("eager")
    mask = additive(torch.from_numpy(layout.mask()), torch.float32)[None, None]
    output = engine.model(
        input_ids=torch.tensor([ids]),
        attention_mask=mask,
        position_ids=torch.from_numpy(layout.positions())[None],
        output_attentions=True,
    )
    engine.model.set_attn_implementation(before)
    rows = torch.stack([layer[0, :, -2] for layer in output.attentions])
    return torch.stack([rows[..., low:high].sum(-1) for low, high in pairwise(ends)], -1)


HEADS_TRIED = [
    ("entropy", 1.5),
    ("entropy", 0.0),
    ("attention", 0.8),
    ("edatt", 0.4),
    ("wait_k", 2),
    ("ratio", 1.5),
    ("batch", 0),
]


@pytest.mark.parametrize("name, setting", HEADS_TRIED)
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"max_reads": 2},
        {"whole_words": False},
        {"min_lag": 2, "max_lag": 3},
        {"min_lag": 2, "max_reads": 1},
    ],
)
def test_a_batch_writes_what_a_row_alone_does(engine, name, setting, extra):
    options = sampling(DECISION_HEADS.resolve(name)(setting), temperature=0.0, **extra)
    asked = requests()
    for request, made in zip(asked, engine.generate(asked, options)):
        tokens, reads = alone(engine, request, options)
        own = made.sampled_mask
        assert np.asarray(made.completion_ids)[own].tolist() == tokens
        assert made.reads[own].tolist() == reads


@pytest.mark.parametrize("name, setting", HEADS_TRIED)
def test_log_probs_are_those_of_one_masked_forward(engine, name, setting):
    asked = requests()
    for made in engine.generate(asked, sampling(DECISION_HEADS.resolve(name)(setting))):
        hidden = masked_states(engine.model, made.token_ids, made.layout)
        logprobs = (
            engine.model.lm_head(hidden).float().log_softmax(-1)[len(made.prompt_ids) - 1 : -1]
        )
        exact = logprobs.gather(-1, torch.tensor(made.completion_ids)[:, None])[:, 0].numpy()
        own = made.sampled_mask
        assert own.sum() > 0 and np.abs(exact - made.logprobs)[own].max() < 1e-5


def test_wait_k_reads_k_units_ahead_of_the_words(engine):
    options = sampling(DECISION_HEADS.resolve("wait_k")(2), temperature=0.0)
    for request, made in zip(requests(), engine.generate(requests(), options)):
        own, words = made.sampled_mask, -1
        for place, (token, read) in enumerate(
            zip(np.asarray(made.completion_ids)[own], made.reads[own])
        ):
            begins = bool(STARTS[token]) or place == 0
            words += begins
            # more of the source may turn a new word that was proposed into more of the old one
            if begins:
                assert read == min(2 + words, len(request.segments) - 1)


def test_attention_by_unit_is_that_of_the_masked_forward(engine):
    class Keeper(DecisionHead):
        needs_attention, needs_setting = True, False

        def writes(self, state):
            seen.append((state.read.clone(), state.attention.clone()))
            return state.finished

    seen, request = [], requests()[6]
    made = engine.generate([request], sampling(Keeper(0), max_new_tokens=1, temperature=0.0))[0]
    ends = np.cumsum([len(s) for s in request.segments])
    assert [int(read) for read, _ in seen] == list(range(1, len(ends)))
    for read, attention in seen:
        opening = [t for part in request.opening for t in part]
        layout = from_visible(ends[-1], [ends[0]] * len(opening) + [ends[int(read)]])
        expected = by_unit(engine, [*request.prompt_ids, *opening, 0], layout, ends)
        assert torch.allclose(attention[:, 0], expected, atol=1e-5)
        assert expected[..., int(read) :].abs().max() == 0 if int(read) < len(ends) - 1 else True
    assert len(made.completion_ids) == len(request.opening[0]) + 1


def test_a_recorder_keeps_the_scores_with_all_read(engine):
    recorder = Recorder(DECISION_HEADS.resolve("entropy")(0.0))
    made = engine.generate(requests(), sampling(recorder, temperature=0.0, max_reads=1))
    begun = [STARTS[np.asarray(t.completion_ids)[t.sampled_mask]] for t in made]
    assert len(recorder.scores) == sum(int(b[1:].sum()) + 1 for b in begun)  # words, not tokens
    assert len(recorder.scores) < sum(map(len, begun))
    assert all(
        (t.reads[t.sampled_mask] == len(r.segments) - 1).all() for t, r in zip(made, requests())
    )
    assert recorder.quantile(0) == min(recorder.scores) and recorder.quantile(1) == max(
        recorder.scores
    )


def test_scores_of_attention_by_hand():
    # [2 layers, 2 rows, 1 head, 3 units]
    attention = torch.tensor(
        [[[[0.1, 0.3, 0.0]], [[0.2, 0.1, 0.1]]], [[[0.3, 0.1, 0.0]], [[0.2, 0.1, 0.3]]]]
    )
    state = State(None, torch.tensor([2, 3]), None, None, None, attention)
    newest = DECISION_HEADS.resolve("edatt")(0.45).score(state)
    assert newest.tolist() == pytest.approx([0.4 / 0.8, 0.4 / 1.0])
    assert DECISION_HEADS.resolve("edatt")(0.45).writes(state).tolist() == [False, True]
    assert DECISION_HEADS.resolve("attention")(0.5).score(state).tolist() == pytest.approx(
        [0.7, 0.75]
    )


@pytest.mark.parametrize(
    "name, setting",
    [("entropy", -0.1), ("attention", 1.5), ("edatt", -0.1), ("wait_k", 0), ("ratio", 0)],
)
def test_a_setting_out_of_range(name, setting):
    with pytest.raises(ConfigError, match=f"proactive.setting={setting:g} must be"):
        DECISION_HEADS.resolve(name)(setting)


def test_nothing_to_calibrate_on():
    with pytest.raises(DataError, match="nothing to calibrate"):
        Recorder(DECISION_HEADS.resolve("entropy")(0.0)).quantile(0.9)
