"""Streaming generation, for real: batched, live and the full masked forward agree; caps, slots,
stops and seeds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recipes.compose import compose
from recipes.errors import ConfigError, ModelError
from rollouts.engines.huggingface import HuggingFaceEngine
from rollouts.engines.vllm import VllmEngine
from rollouts.layout import check_layouts
from rollouts.streaming.engine import StreamingEngine, masked_states
from rollouts.streaming.interleaved import InterleavedEngine
from rollouts.streaming.tokens import StreamingSampling
from rollouts.sync import sync_weights
from rollouts.trajectory import Request, sample_seed
from trainers.core.batching import pack, unpack
from trainers.core.policy import load_policy
from trainers.core.scoring import score_tokens

CPU = torch.device("cpu")
CLOSE = 7
SAMPLING = StreamingSampling(
    max_new_tokens=9,
    stop_ids=tuple(range(60, 110)),
    thought_stops=(CLOSE, *range(110, 170)),
    max_thought_tokens=5,
    close_id=CLOSE,
)


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request, tiny_models, tmp_path_factory):
    """Qwen3 has a key per query head, this Llama one for every three, and no norm of them."""
    if request.param == "qwen3":
        return tiny_models["student"]
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=6,
            head_dim=8,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
        )
    )
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder


def make(folder, layout="grouped", **keys):
    config = compose(
        [
            "recipe=streaming_sft",
            f"streaming.layout={layout}",
            "rollout.engine=streaming",
            "rollout.batch_size=16",
            *(f"{key.replace('__', '.')}={value}" for key, value in keys.items()),
        ]
    )
    return StreamingEngine(str(folder), config, CPU, torch.float32)


def requests(count=12, samples=2, seed=0):
    """Prompts of 0 to 4 sentences and ragged lengths, two samples each."""
    rng = np.random.default_rng(seed)
    batch = []
    for prompt in range(count):
        segments = [
            tuple(rng.integers(170, 390, rng.integers(1, 6)).tolist())
            for _ in range(2 + prompt % 5)
        ]
        opening = tuple(
            tuple(rng.integers(170, 390, rng.integers(1, 4)).tolist()) for _ in range(2)
        )
        batch += [
            Request(
                prompt,
                s,
                tuple(i for part in segments for i in part),
                sample_seed(0, 1, prompt, s),
                tuple(segments),
                opening,
            )
            for s in range(samples)
        ]
    return batch


def trainers_logprobs(policy, trajectories):
    batch = pack(trajectories, range(len(trajectories)), CPU)
    with torch.no_grad():
        hidden = policy.hidden(batch)
    return unpack(
        batch,
        trajectories,
        score_tokens(
            policy.head, hidden, targets=batch.targets, temperature=1.0, vocab=None
        ).logprobs,
    )


@pytest.mark.parametrize("layout, offset", [("grouped", 0), ("grouped", 6), ("batch", 0)])
def test_batched_live_and_the_full_masked_forward_agree(folder, layout, offset):
    engine = make(folder, layout, streaming__target_offset=offset)
    asked = requests()
    drawn = engine.generate(asked, SAMPLING)
    policy = load_policy(str(folder), torch.float32, CPU)
    for request, trajectory, expected in zip(asked, drawn, trainers_logprobs(policy, drawn)):
        chosen = trajectory.sampled
        np.testing.assert_allclose(trajectory.logprobs[chosen], expected[chosen], atol=1e-5, rtol=0)
        assert (trajectory.logprobs[~chosen] == 0).all()
        live, written = engine.live(SAMPLING, request.seed), []
        if layout == "batch":
            for segment in request.segments:
                live.feed(segment)
        for step in range(max(len(request.opening), len(request.segments)) + 1):
            if layout == "grouped" and step < len(request.segments):
                live.feed(request.segments[step])
            if step < len(request.opening):
                live.force(request.opening[step])
            elif step < len(request.opening) + request.thoughts:
                written += live.write()
        written += live.write(deep=True)
        start = sum(map(len, request.opening))
        assert [token for token, _, _ in written] == trajectory.completion_ids[start:]
        assert [sampled for _, _, sampled in written] == chosen[start:].tolist()
        np.testing.assert_allclose(
            [logprob for _, logprob, _ in written], trajectory.logprobs[start:], atol=1e-5, rtol=0
        )


def test_slots_caps_and_stops(folder):
    asked = requests(40)
    drawn = make(folder).generate(asked, SAMPLING)
    assert {t.finish_reason for t in drawn} == {"stop", "length"}
    capped = 0
    for request, trajectory in zip(asked, drawn):
        assert (trajectory.prompt_index, trajectory.sample_index) == (
            request.prompt_index,
            request.sample_index,
        )
        assert trajectory.prompt_ids == list(request.prompt_ids)
        ids, slots = np.array(trajectory.completion_ids), trajectory.slots
        opening = [i for part in request.opening for i in part]
        assert ids[slots < 0].tolist() == opening and not trajectory.sampled[: len(opening)].any()
        assert (
            sorted(set(slots[len(opening) :])) == list(range(request.thoughts + 1))
            and (np.diff(slots) >= 0).all()
        )
        for slot in range(request.thoughts):
            own, sampled = ids[slots == slot], trajectory.sampled[slots == slot]
            assert not np.isin(own[:-1], SAMPLING.thought_stops).any() and sampled[:-1].all()
            assert own[-1] in SAMPLING.thought_stops and len(own) <= 5
            if not sampled[-1]:
                assert len(own) == 5 and own[-1] == CLOSE
                capped += 1
        deep = ids[slots == request.thoughts]
        assert (
            trajectory.sampled[slots == request.thoughts].all()
            and not np.isin(deep[:-1], SAMPLING.stop_ids).any()
        )
        assert (deep[-1] in SAMPLING.stop_ids) == (trajectory.finish_reason == "stop")
        assert len(deep) <= 9 and (len(deep) == 9 or trajectory.finish_reason == "stop")
    assert 0 < capped < sum(r.thoughts for r in asked)


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(folder):
    engine, asked = make(folder), requests()
    together = engine.generate(asked, SAMPLING)
    alone = [engine.generate([r], SAMPLING)[0] for r in asked[:6]]
    backwards = engine.generate(asked[::-1], SAMPLING)[::-1]
    assert [t.completion_ids for t in together[:6]] == [t.completion_ids for t in alone]
    assert [t.completion_ids for t in together] == [t.completion_ids for t in backwards]
    assert (
        sum(a.completion_ids == b.completion_ids for a, b in zip(together[::2], together[1::2])) < 3
    )


def test_a_changed_sentence_changes_nothing_that_was_written_before_it(folder):
    engine = make(folder)
    before = requests(15, samples=1)[4::5]  # of four sentences
    other = [(*r.segments[:-1], tuple(i - 100 for i in r.segments[-1])) for r in before]
    after = [
        replace(r, segments=s, prompt_ids=tuple(i for part in s for i in part))
        for r, s in zip(before, other)
    ]
    later = 0
    for a, b in zip(engine.generate(before, SAMPLING), engine.generate(after, SAMPLING)):
        early = (a.slots < 3).sum()
        assert early > 5 and a.completion_ids[:early] == b.completion_ids[:early]
        np.testing.assert_allclose(a.logprobs[:early], b.logprobs[:early], atol=1e-6, rtol=0)
        later += abs(a.logprobs[early] - b.logprobs[early]) > 1e-4
    assert later == len(before)


def test_the_logits_of_a_source_do_not_depend_on_the_target(folder):
    engine = make(folder)
    trajectory = engine.generate(requests()[8:9], SAMPLING)[0]
    layout, count = trajectory.layout, len(trajectory.prompt_ids)
    with torch.no_grad():
        first = masked_states(engine.model, trajectory.token_ids, layout)
        other = masked_states(
            engine.model, [*trajectory.prompt_ids, *trajectory.completion_ids[::-1]], layout
        )
        plain = engine.model.base_model(torch.tensor([trajectory.prompt_ids])).last_hidden_state[0]
    assert torch.equal(first[:count], other[:count]) and not torch.allclose(
        first[count:], other[count:], atol=1e-2
    )
    torch.testing.assert_close(first[:count], plain, atol=1e-5, rtol=1e-5)


def test_new_weights_arrive(folder):
    engine, asked = make(folder), requests(3)
    policy = load_policy(str(folder), torch.float32, CPU)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.05)
    sync_weights(engine, lambda: policy.model.named_parameters(remove_duplicate=False), salt=1)
    drawn = engine.generate(asked, SAMPLING)
    for trajectory, expected in zip(drawn, trainers_logprobs(policy, drawn)):
        chosen = trajectory.sampled
        np.testing.assert_allclose(trajectory.logprobs[chosen], expected[chosen], atol=1e-5, rtol=0)


def test_a_model_with_a_window_is_refused(tiny_models):
    model = HuggingFaceEngine(str(tiny_models["student"]), compose([]), CPU, torch.float32).model
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(
        ModelError,
        match=r"Qwen3ForCausalLM has sliding_attention layers: streaming\.layout grouped and",
    ):
        check_layouts(model, lambda ids, layout: masked_states(model, ids, layout))


@pytest.mark.parametrize(
    "kind", [HuggingFaceEngine, pytest.param(VllmEngine, marks=pytest.mark.slow)]
)
def test_interleaved_rollouts_are_continuations(tiny_models, kind):
    inner = kind(
        str(tiny_models["student"]),
        compose(["rollout.batch_size=16"]),
        CPU,
        torch.float32,
        max_length=128,
    )
    engine, asked = InterleavedEngine(inner), requests()
    drawn = engine.generate(asked, SAMPLING)
    again = engine.generate(asked, SAMPLING)
    policy = load_policy(str(tiny_models["student"]), torch.float32, CPU)
    capped = 0
    for request, trajectory, repeated, expected in zip(
        asked, drawn, again, trainers_logprobs(policy, drawn)
    ):
        assert trajectory.completion_ids == repeated.completion_ids
        chosen, slots, ids = (
            trajectory.sampled,
            trajectory.slots,
            np.array(trajectory.completion_ids),
        )
        np.testing.assert_allclose(trajectory.logprobs[chosen], expected[chosen], atol=2e-5, rtol=0)
        assert (trajectory.logprobs[~chosen] == 0).all() and trajectory.layout is None
        before = [part for pair in zip(request.segments, request.opening) for part in pair]
        assert trajectory.prompt_ids == [
            i for part in (*before, (*request.segments, ())[2]) for i in part
        ]
        for slot in range(request.thoughts):
            own, place = ids[slots == slot], np.flatnonzero(slots == slot)
            assert (
                own[-1] in SAMPLING.thought_stops
                and not np.isin(own[:-1], SAMPLING.thought_stops).any()
            )
            following = (*request.segments, ())[slot + 3]
            assert tuple(ids[place[-1] + 1 : place[-1] + 1 + len(following)]) == following
            capped += not chosen[place[-1]]
            assert chosen[place[-1]] or (len(own) == 5 and own[-1] == CLOSE)
        assert (ids[-1] in SAMPLING.stop_ids) == (trajectory.finish_reason == "stop")
    assert capped > 0
    engine.close()


@pytest.mark.parametrize(
    "layout, sampler, right",
    [
        ("grouped", "vllm", "streaming"),
        ("batch", "hf", "streaming"),
        ("interleaved", "streaming", "vllm or hf"),
        ("null", "streaming", "vllm or hf"),
    ],
)
def test_a_wrong_pair_of_layout_and_engine(layout, sampler, right):
    with pytest.raises(
        ConfigError, match=f"rollout.engine={sampler} cannot sample .*; use rollout.engine={right}$"
    ):
        compose(["recipe=streaming_sft", f"streaming.layout={layout}", f"rollout.engine={sampler}"])
    with pytest.raises(
        ConfigError, match=r"streaming\.layout=groupd is not known; did you mean 'grouped'"
    ):
        compose(["recipe=streaming_sft", "streaming.layout=groupd"])
