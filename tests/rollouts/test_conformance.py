"""Every rollout engine offers the `Engine` protocol, and keeps the promises of its docstrings.

An engine that is added to `recipes.components.ENGINES` needs a line in `CASES`.
"""

import inspect
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes.components import DECISION_HEADS, ENGINES
from recipes.compose import compose
from recipes.errors import SyncError
from rollouts.engines.base import Engine
from rollouts.simultaneous.decision import SimultaneousSampling
from rollouts.streaming.interleaved import InterleavedEngine
from rollouts.streaming.tokens import StreamingSampling
from rollouts.sync import fingerprint, sync_weights, verify
from rollouts.trajectory import Request, Sampling, sample_seed

VOCAB = 380  # fewer than the tokens of the tiny model
STOPS = tuple(range(60, 110))
CLOSE = 7
METHODS = ("generate", "load_weights", "fingerprints", "sleep", "wake", "close")

PLAIN = Sampling(max_new_tokens=12, stop_ids=STOPS, vocab=VOCAB)
STREAMING = StreamingSampling(
    max_new_tokens=9,
    stop_ids=STOPS,
    vocab=VOCAB,
    thought_stops=(CLOSE, *range(110, 170)),
    max_thought_tokens=5,
    close_id=CLOSE,
)
SIMULTANEOUS = SimultaneousSampling(
    max_new_tokens=12,
    stop_ids=STOPS,
    vocab=VOCAB,
    head=DECISION_HEADS.resolve("wait_k")(2),
    word_starts=np.arange(VOCAB) % 3 != 0,
)


@dataclass(frozen=True)
class Case:
    """One engine: its name in `ENGINES`, and what a run that selects it has."""

    engine: str
    recipe: str
    layout: str
    sampling: Sampling
    wrapped: bool = False


CASES = {
    "hf": Case("hf", "poweropd", "null", PLAIN),
    "vllm": Case("vllm", "poweropd", "null", PLAIN),
    "streaming": Case("streaming", "adasr", "grouped", STREAMING),
    "simultaneous": Case("simultaneous", "proactivellm", "scheduled", SIMULTANEOUS),
    "interleaved-hf": Case("hf", "adasr", "interleaved", STREAMING, wrapped=True),
    "interleaved-vllm": Case("vllm", "adasr", "interleaved", STREAMING, wrapped=True),
}
SLOW = {"vllm", "interleaved-vllm"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES],
)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def engine(case, tiny_models):
    overrides = [
        f"recipe={case.recipe}",
        f"model.path={tiny_models['student']}",
        f"rollout.engine={case.engine}",
        "rollout.batch_size=8",
    ]
    if case.layout != "null":
        overrides.append(f"streaming.layout={case.layout}")
    engine = ENGINES.resolve(case.engine)(
        str(tiny_models["student"]),
        compose(overrides),
        torch.device("cpu"),
        torch.float32,
        max_length=128,
    )
    if case.wrapped:
        engine = InterleavedEngine(engine)
    yield engine
    assert engine.close() is None


@pytest.fixture
def model(tiny_models):
    return AutoModelForCausalLM.from_pretrained(tiny_models["student"], dtype=torch.float32)


def requests(step: int = 1) -> list[Request]:
    """Two samples of ten prompts, of 1 to 5 segments of 1 to 5 tokens after the first."""
    rng = np.random.default_rng(0)
    batch = []
    for prompt in range(10):
        lengths = rng.integers(1, 6, 2 + prompt % 5)
        segments = tuple(tuple(rng.integers(170, VOCAB, n).tolist()) for n in lengths)
        opening = tuple(tuple(rng.integers(170, VOCAB, n).tolist()) for n in (2, 1))
        ids = tuple(token for segment in segments for token in segment)
        for sample in range(2):
            seed = sample_seed(0, step, prompt, sample)
            batch.append(Request(prompt, sample, ids, seed, segments, opening))
    return batch


def weights_of(model):
    return ((name, p.detach()) for name, p in model.named_parameters(remove_duplicate=False))


def tokens(trajectories) -> list[list[int]]:
    return [trajectory.completion_ids for trajectory in trajectories]


def test_every_engine_has_a_case():
    assert {case.engine for case in CASES.values()} == set(ENGINES)


def test_the_protocol_has_these_methods(engine):
    methods = {name for name in vars(Engine) if not name.startswith("_")}
    assert methods == set(METHODS)
    assert isinstance(engine, Engine)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_the_parameters_of_the_protocol(engine, method):
    promised = list(inspect.signature(getattr(Engine, method)).parameters.values())[1:]
    signature = inspect.signature(getattr(engine, method))
    required = [p.name for p in promised if p.default is p.empty]
    signature.bind(*required)
    signature.bind(**{p.name: None for p in promised})
    for parameter in promised:
        assert signature.parameters[parameter.name].default == parameter.default


def test_one_trajectory_per_request_in_their_order(engine, case):
    batch = requests()
    trajectories = engine.generate(batch, case.sampling)
    assert len(trajectories) == len(batch)
    for request, trajectory in zip(batch, trajectories):
        identity = trajectory.prompt_index, trajectory.sample_index
        assert identity == (request.prompt_index, request.sample_index)
        assert trajectory.prompt_ids[: len(request.segments[0])] == list(request.segments[0])
    assert engine.generate([], case.sampling) == []


def test_log_probs_are_finite_float32_of_the_sampled_tokens(engine, case):
    for trajectory in engine.generate(requests(), case.sampling):
        logprobs, sampled = trajectory.logprobs, trajectory.sampled_mask
        assert logprobs.dtype == np.float32
        assert logprobs.shape == sampled.shape == (len(trajectory.completion_ids),)
        assert np.isfinite(logprobs).all() and (logprobs <= 0).all()
        assert sampled.any() and (logprobs[sampled] < 0).all() and (logprobs[~sampled] == 0).all()


def test_ids_are_below_the_vocabulary_and_only_the_last_one_stops(engine, case):
    for trajectory in engine.generate(requests(), case.sampling):
        assert all(0 <= token < VOCAB for token in trajectory.completion_ids)
        stopped = trajectory.completion_ids[-1] in STOPS
        assert trajectory.finish_reason == ("stop" if stopped else "length")


def test_the_same_seeds_give_the_same_tokens_in_any_batch(engine, case):
    batch = requests()
    together = tokens(engine.generate(batch, case.sampling))
    assert tokens(engine.generate(batch, case.sampling)) == together
    assert tokens(engine.generate(batch[::-1], case.sampling))[::-1] == together
    assert tokens(engine.generate(batch[::3], case.sampling)) == together[::3]
    other = tokens(engine.generate(requests(step=2), case.sampling))
    assert sum(one == another for one, another in zip(together, other)) < 5


def test_prompts_that_continue_give_the_same_tokens(engine, case):
    batch = requests()
    first = tokens(engine.generate(batch, case.sampling))
    assert tokens(engine.generate(batch, case.sampling, continues=True)) == first


def test_greedy_tokens_do_not_depend_on_the_seed(engine, case):
    greedy = replace(case.sampling, temperature=0.0)
    one, another = (tokens(engine.generate(requests(step), greedy)) for step in (1, 2))
    assert one == another


def test_finished_completions_are_counted(engine, case):
    counts = []
    engine.generate(requests(), case.sampling, on_finished=counts.append)
    assert sum(counts) == len(requests()) and min(counts) > 0


def test_weights_arrive_and_come_back(engine, case, model):
    batch = requests()
    sync_weights(engine, lambda: weights_of(model), salt=1)
    before = engine.generate(batch, case.sampling)
    original = {name: weight.clone() for name, weight in weights_of(model)}
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    sync_weights(engine, lambda: weights_of(model), salt=2)
    assert tokens(engine.generate(batch, case.sampling)) != tokens(before)
    sync_weights(engine, lambda: iter(original.items()), salt=3)
    after = engine.generate(batch, case.sampling)
    assert tokens(after) == tokens(before)
    for one, another in zip(before, after):
        np.testing.assert_allclose(one.logprobs, another.logprobs, atol=1e-6)


def test_a_changed_tensor_is_named_and_an_unknown_one_is_none(engine, model):
    sync_weights(engine, lambda: weights_of(model), salt=1)
    name = "model.layers.1.mlp.up_proj.weight"
    expected = {n: fingerprint(weight, n, 5) for n, weight in weights_of(model)}
    assert engine.fingerprints(list(expected), 5) == expected
    changed = dict(weights_of(model))[name].clone()
    changed[3, 2] += 1e-3
    with pytest.raises(SyncError, match=r"layers\.1\.mlp\.up_proj\.weight differs"):
        verify(engine, expected | {name: fingerprint(changed, name, 5)}, 5)
    assert engine.fingerprints(["no.such.weight"], 5) == {"no.such.weight": None}


def test_weights_that_the_engine_consumes_may_be_few(engine, case, model):
    """A sync sends buckets; each call takes what it is given and leaves the rest."""
    batch = requests()
    sync_weights(engine, lambda: weights_of(model), salt=1)
    before = tokens(engine.generate(batch, case.sampling))
    engine.load_weights(pair for pair in weights_of(model) if pair[0] == "model.norm.weight")
    assert tokens(engine.generate(batch, case.sampling)) == before


def test_an_engine_wakes_up_as_it_went_to_sleep(engine, case, model):
    sync_weights(engine, lambda: weights_of(model), salt=1)
    before = tokens(engine.generate(requests(), case.sampling))
    engine.sleep()
    engine.wake()
    sync_weights(engine, lambda: weights_of(model), salt=2)
    assert tokens(engine.generate(requests(), case.sampling)) == before
