"""Both token engines, for real: the trainer's log-probs, seeds, stops, and verified weights."""

import math
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.compose import compose
from recipes.errors import SyncError
from rollouts.engines.decoding import Decoding, uniforms
from rollouts.engines.huggingface import HuggingFaceEngine
from rollouts.engines.sampling import invert_cdf, sample
from rollouts.engines.vllm import VllmEngine
from rollouts.sync import checksum, fingerprint, sampled_columns, sync_weights
from rollouts.trajectory import Request, Sampling, sample_seed

SAMPLING = Sampling(max_new_tokens=20, stop_ids=(7, 11))


def made(kind, tiny_models):
    config = compose(["rollout.batch_size=16"])
    engine = kind(
        str(tiny_models["student"]), config, torch.device("cpu"), torch.float32, max_length=128
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def vllm_engine(tiny_models):
    yield from made(VllmEngine, tiny_models)


@pytest.fixture(scope="module")
def hf_engine(tiny_models):
    yield from made(HuggingFaceEngine, tiny_models)


@pytest.fixture(params=[pytest.param("vllm", marks=pytest.mark.slow), "hf"])
def engine(request):
    return request.getfixturevalue(f"{request.param}_engine")


@pytest.fixture
def model(tiny_models):
    return AutoModelForCausalLM.from_pretrained(tiny_models["student"], dtype=torch.float32).eval()


def requests(count=24, step=1):
    rng = np.random.default_rng(0)
    return [
        Request(i, 0, tuple(rng.integers(20, 400, 3 + i % 9).tolist()), sample_seed(0, step, i, 0))
        for i in range(count)
    ]


def weights_of(model):
    return ((n, p.detach()) for n, p in model.named_parameters(remove_duplicate=False))


def reset(engine, model):
    sync_weights(engine, lambda: weights_of(model), salt=0)


class Partial:
    """An engine to which tensors arrive changed; those that become None do not arrive."""

    def __init__(self, engine, change):
        self.fingerprints = engine.fingerprints
        self.engine, self.change = engine, change

    def load_weights(self, weights):
        changed = ((name, self.change(name, weight)) for name, weight in weights)
        self.engine.load_weights(pair for pair in changed if pair[1] is not None)


def test_log_probs_are_those_of_the_full_forward(engine, model):
    reset(engine, model)
    for trajectory in engine.generate(requests(), SAMPLING):
        with torch.no_grad():
            logits = model(torch.tensor([trajectory.token_ids])).logits[0].log_softmax(-1)
        start = len(trajectory.prompt_ids)
        expected = [
            float(logits[start + t - 1, token]) for t, token in enumerate(trajectory.completion_ids)
        ]
        np.testing.assert_allclose(trajectory.logprobs, expected, atol=2e-5)


def test_stops_and_lengths(engine, model):
    reset(engine, model)
    trajectories = engine.generate(requests(200), SAMPLING)
    assert {t.finish_reason for t in trajectories} == {"stop", "length"}
    for trajectory in trajectories:
        stops = [t in SAMPLING.stop_ids for t in trajectory.completion_ids]
        assert not any(stops[:-1])
        assert stops[-1] == (trajectory.finish_reason == "stop")
        assert len(trajectory.completion_ids) == 20 or stops[-1]


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(engine, model):
    reset(engine, model)
    together = engine.generate(requests(), SAMPLING)
    alone = [engine.generate([r], SAMPLING)[0] for r in requests()[:4]]
    backwards = engine.generate(requests()[::-1], SAMPLING)[::-1]
    other = engine.generate(requests(step=2), SAMPLING)
    assert [t.completion_ids for t in together[:4]] == [t.completion_ids for t in alone]
    assert [t.completion_ids for t in together] == [t.completion_ids for t in backwards]
    assert sum(a.completion_ids == b.completion_ids for a, b in zip(together, other)) < 3


def test_vllm_draws_anew_where_its_samples_are_not_seeded(engine, model, monkeypatch):
    """`rollout.seeded` is vLLM's; the other engine always has seeds."""
    reset(engine, model)
    monkeypatch.setattr(engine, "seeded", False, raising=False)
    first, second = (engine.generate(requests(), SAMPLING) for _ in range(2))
    same = [a.completion_ids == b.completion_ids for a, b in zip(first, second)]
    assert sum(same) < 3 if isinstance(engine, VllmEngine) else all(same)


def test_greedy_is_the_argmax(engine, model):
    reset(engine, model)
    for trajectory in engine.generate(requests(3), Sampling(8, temperature=0.0)):
        with torch.no_grad():
            best = model(torch.tensor([trajectory.token_ids])).logits[0].argmax(-1)
        start = len(trajectory.prompt_ids)
        assert trajectory.completion_ids == best[start - 1 : -1].tolist()


def test_new_weights_arrive(engine, model):
    reset(engine, model)
    before = engine.generate(requests(4), SAMPLING)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    reset(engine, model)
    after = engine.generate(requests(4), SAMPLING)
    assert [t.completion_ids for t in before] != [t.completion_ids for t in after]
    with torch.no_grad():
        logits = model(torch.tensor([after[0].token_ids])).logits[0].log_softmax(-1)
    start = len(after[0].prompt_ids)
    np.testing.assert_allclose(
        after[0].logprobs[0], float(logits[start - 1, after[0].completion_ids[0]]), atol=2e-5
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.o_proj.weight",
    ],
)
def test_a_tensor_that_did_not_arrive_is_named_and_no_other(engine, model, name):
    reset(engine, model)
    stale = dict(weights_of(model))[name].clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    partial = Partial(engine, lambda n, weight: stale if n == name else weight)
    with pytest.raises(SyncError, match=re.escape(name)) as error:
        sync_weights(partial, lambda: weights_of(model), salt=3)
    assert "more" not in str(error.value)


@pytest.mark.slow
def test_vllms_tied_head_goes_stale_unless_it_is_sent_too(vllm_engine, model):
    """On a CPU it has a packed copy of the head, which a reload of the embedding does not touch."""
    reset(vllm_engine, model)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.1)
    assert "lm_head.weight" not in dict(model.named_parameters())
    partial = Partial(
        vllm_engine, lambda name, weight: None if name == "lm_head.weight" else weight
    )
    with pytest.raises(SyncError, match=r"lm_head\.weight"):
        sync_weights(partial, lambda: weights_of(model), salt=1)


def test_rows_leave_as_they_finish_and_keep_what_they_wrote():
    """Greedy tokens by the script: a row stops, one fills its limit, one skips a step."""
    script = [[5, 1], [5, 6, 7, 8], [3, 1]]
    batch = [Request(0, index, (2,), index) for index in range(3)]
    sampling = Sampling(4, temperature=0.0, stop_ids=(1,))
    decoding = Decoding(batch, sampling, [4, 4, 4], torch.device("cpu"), step=torch.long)
    left, step = Columns(), 0
    while len(decoding.live):
        rows, places = decoding.live.tolist(), decoding.written.tolist()
        wanted = [script[row][place] for row, place in zip(rows, places)]
        logits = torch.nn.functional.one_hot(torch.tensor(wanted), 10).float()
        tokens, logprobs = decoding.propose(logits)
        # The last request reads instead of writing in the first step.
        writes = (decoding.live != 2) | (step > 0)
        steps = torch.full_like(tokens, step)
        decoding.write(writes, tokens=tokens, logprobs=logprobs, step=steps)
        decoding.leave(writes & decoding.on_stop(tokens), decoding.full, left)
        step += 1
    completions = list(decoding.completions())
    assert [written["tokens"].tolist() for _, written, _ in completions] == script
    assert [written["step"].tolist() for _, written, _ in completions] == [
        [0, 1],
        [0, 1, 2, 3],
        [1, 2],
    ]
    assert [reason for _, _, reason in completions] == ["stop", "length", "stop"]
    # The first row leaves after the second step, the last one after the third.
    assert left.selected == [[1, 2], [0]]


class Columns:
    def __init__(self):
        self.selected = []

    def select(self, rows):
        self.selected.append(rows.tolist())


def test_a_limit_of_zero_is_an_empty_completion():
    decoding = Decoding([Request(0, 0, (2,), 0)], Sampling(0), [0], torch.device("cpu"))
    assert len(decoding.live) == 0
    ((_, written, reason),) = decoding.completions()
    assert written["tokens"].tolist() == [] and reason == "length"


def test_uniforms_are_those_of_the_request_alone():
    batch = [Request(0, index, (2,), index) for index in range(3)]
    together = uniforms(batch, [5, 3, 8])
    for row, limit in enumerate((5, 3, 8)):
        alone = uniforms([batch[row]], [limit])
        assert torch.equal(together[row, :limit], alone[0])
        assert (together[row, limit:] == 0).all()


def test_fingerprints_see_every_bit_and_place():
    torch.manual_seed(0)
    weight = torch.randn(50, 40)
    base = fingerprint(weight, "w", 0)
    for row, column in ((0, 0), (49, 39), (13, 7)):
        changed = weight.clone()
        changed[row, column] = math.nextafter(float(changed[row, column]), 10) + 1e-7
        assert fingerprint(changed, "w", 0) != base
    swapped = weight.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert fingerprint(swapped, "w", 0) != base
    assert checksum(torch.tensor([0.0, -0.0])) == checksum(torch.zeros(2))
    wide = {tuple(sampled_columns("w", 1000, salt).tolist()) for salt in range(5)}
    assert len(wide) == 5 and all(len(columns) == 64 for columns in wide)


def test_the_hf_sampler_draws_from_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(12) * 1.5
    count = 200_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for sampling in (
        Sampling(1, temperature=0.7),
        Sampling(1, top_k=3),
        Sampling(1, top_p=0.6),
        Sampling(1, 1.3, 0.8, 5),
    ):
        scaled = (logits.double() / sampling.temperature).softmax(-1)
        expected = scaled.clone()
        order = expected.argsort(descending=True)
        if sampling.top_k > 0:
            expected[order[sampling.top_k :]] = 0
        if sampling.top_p < 1:
            expected /= expected.sum()
            before = expected[order].cumsum(0) - expected[order]
            expected[order[before >= sampling.top_p]] = 0
        expected /= expected.sum()
        tokens, logprobs = sample(logits.expand(count, -1), uniforms, sampling)
        share = torch.bincount(tokens, minlength=12) / count
        torch.testing.assert_close(share.double(), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(logprobs.double(), scaled.log()[tokens], atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [1, 12, 128, 129, 5000])
def test_the_blockwise_draw_is_the_plain_one(width):
    """The cumulative sum of the whole row is its specification."""
    generator = torch.Generator().manual_seed(width)
    weights = torch.rand(400, width, generator=generator)
    weights[torch.rand(weights.shape, generator=generator) < 0.5] = 0
    weights[:, -1] = 1
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    cdf = weights.double().cumsum(-1)
    expected = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0]
    assert torch.equal(invert_cdf(weights, uniforms), expected)


def test_a_weight_of_zero_is_never_drawn():
    weights = torch.zeros(3, 1000)
    weights[:, 700] = 1e-30
    drawn = invert_cdf(weights, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64))
    assert drawn.tolist() == [700, 700, 700]


def test_a_diverged_models_draw_is_a_token_of_the_vocabulary():
    drawn = invert_cdf(
        torch.full((2, 130), torch.nan), torch.tensor([0.0, 0.9], dtype=torch.float64)
    )
    assert all(0 <= token < 130 for token in drawn.tolist())


def test_seeds_differ_by_step_prompt_sample_and_purpose():
    seeds = {
        sample_seed(r, s, p, n, w)
        for r in (0, 1)
        for s in (1, 2)
        for p in (1, 12)
        for n in (0, 2)
        for w in ("train", "eval")
    }
    assert len(seeds) == 32 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.slow
def test_both_engines_decode_the_same_greedy_text(vllm_engine, hf_engine, model, tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["student"])
    ids = tuple(tokenizer("Mia has 34 shells.").input_ids)
    texts = []
    for engine in (vllm_engine, hf_engine):
        reset(engine, model)
        (trajectory,) = engine.generate([Request(0, 0, ids, 0)], Sampling(16, temperature=0.0))
        texts.append(trajectory.completion_ids)
    assert texts[0] == texts[1]
