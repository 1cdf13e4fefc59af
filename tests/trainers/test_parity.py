"""The parity gate passes where trainer and sampler agree, and trips on every fault planted in one
of them; the importance weight; the layouts of each method."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.compatibility.families import FAMILIES, make
from recipes.components import TRAINERS
from recipes.compose import compose, recipe_values, recipes
from recipes.errors import ConfigError, TrainingError
from rollouts.trajectory import Trajectory
from trainers.base import Trainer
from trainers.loop import Loop
from trainers.opd import OnPolicyDistillation
from trainers.parity import check_parity
from trainers.prepare import check_layout, prepare
from trainers.run import Run

BFLOAT16 = {"model__dtype": "bfloat16", "engine": "zero1"}
SFT = {"recipe": "sft", "rollout__engine": "hf", "data__stories": 8, "data__difficulty": 1}


@pytest.fixture
def started(overrides, tmp_path):
    """Starts runs as `train.py` does, up to the gate; releases them."""
    loops = []

    def start(**changes) -> Loop:
        keys = SFT | {"run__dir": tmp_path / f"run{len(loops)}"} | changes
        loops.append(Loop(prepare(compose(overrides(**keys)))))
        return loops[-1]

    yield start
    for loop in loops:
        loop.engine.close()


def gate(loop: Loop) -> str:
    loop.sync(0)
    return check_parity(loop.run, loop.engine)


def refused(loop: Loop) -> str:
    with pytest.raises(TrainingError, match="rollout.max_mismatch") as caught:
        check_parity(loop.run, loop.engine)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def family(tiny_models, tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["student"])
    return lambda name: make(FAMILIES[name], tmp_path_factory.mktemp(name), tokenizer, seed=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_passes(started, family, name):
    assert gate(started(model__path=family(name))).startswith("parity  largest difference")


@pytest.mark.parametrize(
    "changes",
    [
        BFLOAT16,
        {"model__lora__rank": 4, "rollout__temperature": 0.7, "rollout__top_p": 0.9},
        {"recipe": "streaming_sft", "streaming__layout": "grouped", "rollout__engine": "streaming"},
        {"recipe": "streaming_sft", "streaming__layout": "interleaved"},
        {
            "recipe": "proactivellm",
            "data__path": "translation",
            "eval__path": "translation",
            "rollout__engine": "simultaneous",
        },
    ],
    ids=["bfloat16", "lora", "streaming", "interleaved", "simultaneous"],
)
def test_a_kind_of_run_passes(started, streaming_model, changes):
    if changes.get("recipe") == "streaming_sft":
        changes = changes | {"model__path": streaming_model, "data__difficulty": 2}
    loop = started(**changes)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    said = gate(loop)
    assert "tokens: sampler" in said and "eager attention" in said
    # The numbers of a training do not move.
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def sampling_with(engine, **changes):
    """The engine samples with other settings than it is told."""
    generate = engine.generate
    engine.generate = lambda requests, sampling: generate(requests, replace(sampling, **changes))


def reporting(engine, change):
    """The engine reports log-probs [T] that `change` makes of its own."""
    generate = engine.generate

    def changed(requests, sampling):
        trajectories = generate(requests, sampling)
        for trajectory in trajectories:
            trajectory.logprobs = change(trajectory.logprobs)
        return trajectories

    engine.generate = changed


def other_weights(loop):
    for tensor in loop.run.rollout.parameters.values():
        tensor.mul_(1.01)


def other_temperature(loop):
    sampling_with(loop.run.rollout, temperature=1.0)


def shifted(loop):
    reporting(loop.run.rollout, lambda logprobs: np.roll(logprobs, 1))


def not_a_number(loop):
    reporting(loop.run.rollout, lambda logprobs: logprobs * np.float32("nan"))


@pytest.mark.parametrize(
    ("fault", "changes"),
    [
        (other_weights, {}),
        (other_temperature, {}),
        (shifted, {}),
        (not_a_number, {}),
        (other_temperature, BFLOAT16),
    ],
)
def test_a_fault_of_the_sampler_ends_the_run(started, fault, changes):
    loop = started(rollout__temperature=0.7, **changes)
    gate(loop)
    fault(loop)
    said = refused(loop)
    assert said.startswith("before step 1 the ") and "rollout.engine=hf is" in said
    assert "the sampler may differ in weights" in said and "eager attention -" in said


def no_score_cap(model):
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None


def no_logit_cap(model):
    model.config.final_logit_softcapping = None


@pytest.mark.parametrize("fault", [no_score_cap, no_logit_cap])
def test_a_soft_cap_that_the_sampler_drops_ends_the_run(started, family, fault):
    loop = started(model__path=family("gemma2"))
    gate(loop)
    fault(loop.run.rollout.model)
    assert "the sampler may differ in weights, attention, soft-cap" in refused(loop)


def test_attention_that_differs_from_eager_in_both_ends_the_run(started, family):
    """sdpa drops the soft-cap. So the trainer and the sampler agree, and both are wrong."""
    loop = started(model__path=family("gemma2"))
    gate(loop)
    for model in (loop.engine.policy.model, loop.run.rollout.model):
        model.set_attn_implementation("sdpa")
    said = refused(loop)
    assert "log-probs and those of eager attention is" in said
    assert "model.attn_implementation=packed computes something else than eager" in said


def bound(loop, most):
    """Set `rollout.max_mismatch`."""
    config = loop.run.config
    loop.run.config = replace(config, rollout=replace(config.rollout, max_mismatch=most))


def test_the_bound_is_a_key(started):
    loop = started(rollout__max_mismatch=1e-9)
    loop.sync(0)
    assert "more than 1e-09 (rollout.max_mismatch)" in refused(loop)
    shifted(loop)
    bound(loop, 10.0)
    assert "at most 10 nats" in gate(loop)
    bound(loop, -1.0)
    assert gate(loop) == "parity  not checked: rollout.max_mismatch=-1"


@pytest.mark.parametrize(
    ("changes", "least", "most"), [({}, 1e-7, 1e-4), (BFLOAT16, 1e-4, 1e-2)], ids=["32", "16"]
)
def test_the_default_bound_grows_with_the_models_own_rounding(
    started, monkeypatch, changes, least, most
):
    """As in a pretrained model of 30 layers, any two of whose computations differ by more."""
    for name in ("MAX_DIFFERENCE", "MEAN_DIFFERENCE"):
        monkeypatch.setattr(f"trainers.parity.{name}", 1e-9)
    loop = started(**changes)
    allowed = float(gate(loop).split("at most ")[1].split()[0])
    assert least < allowed < most
    # A bound that is given stays.
    bound(loop, 1e-9)
    assert "more than 1e-09" in refused(loop)
    bound(loop, None)
    shifted(loop)
    assert f"more than {allowed:g}" in refused(loop)


def test_a_sequence_too_long_for_eager_attention_is_compared_without_it(started, monkeypatch):
    loop = started()
    monkeypatch.setattr("trainers.parity.EAGER_TOKENS", 20)
    assert "eager left out" in gate(loop)
    shifted(loop)
    assert ", sampler -" in refused(loop) and "eager attention -" not in refused(loop)


# The truncated importance weight


V, H = 7, 5


def distillation(*overrides) -> OnPolicyDistillation:
    config = compose(["recipe=opd", "reward.terminal_stop=raw", *overrides])
    return OnPolicyDistillation(Run(config=config, mode=None, vocab=V))


@pytest.fixture
def position():
    """One position, and all V tokens that could be sampled there: (head, hidden, batch)."""
    from types import SimpleNamespace

    torch.manual_seed(0)
    head = SimpleNamespace(
        weight=torch.randn(V, H, dtype=torch.float64).requires_grad_(), bias=None, softcap=None
    )
    hidden = torch.randn(1, H, dtype=torch.float64).expand(V, H)
    random = torch.randn(2, V, dtype=torch.float64).log_softmax(-1)
    batch = SimpleNamespace(
        targets=torch.arange(V),
        mask=torch.ones(V, dtype=torch.bool),
        annotations={"teacher_logprobs": random[0]},
    )
    policy = (hidden[0] @ head.weight.T).log_softmax(-1).detach()
    return head, hidden, batch, policy, random[1]


def gradient(made: OnPolicyDistillation, position, weights, rollout=None):
    head, hidden, batch, *_ = position
    batch.annotations |= {"weights": weights}
    if rollout is not None:
        batch.annotations |= {"rollout_logprobs": rollout}
    loss = made.loss()(head, hidden, batch, 1.0)["loss"]
    return torch.autograd.grad(loss, head.weight)[0]


def test_the_weight_makes_the_samplers_expectation_that_of_the_policy(position):
    *_, policy, sampler = position
    on_policy = gradient(distillation(), position, policy.exp())
    biased = gradient(distillation(), position, sampler.exp())
    weighted = gradient(
        distillation("reward.importance_cap=1e9"), position, sampler.exp(), rollout=sampler
    )
    assert not torch.allclose(biased, on_policy, rtol=0.1)
    torch.testing.assert_close(weighted, on_policy, rtol=1e-10, atol=1e-12)


def test_the_weight_is_cut_at_the_cap(position):
    *_, policy, sampler = position
    ratio = (policy - sampler).exp()
    assert 0 < (ratio > 1.2).sum() < V
    expected = gradient(distillation(), position, sampler.exp() * ratio.clamp(max=1.2))
    capped = gradient(
        distillation("reward.importance_cap=1.2"), position, sampler.exp(), rollout=sampler
    )
    torch.testing.assert_close(capped, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cap", [None, 2])
def test_the_samplers_logprobs_are_annotated_for_the_weight_alone(cap):
    made = distillation(f"reward.importance_cap={cap or 'null'}")
    made.run.teacher = type("", (), {"annotate": lambda self, trajectories, hidden: None})()
    trajectory = Trajectory(0, 0, [1], [2, 3], "stop", np.float32([-1, -2]))
    made.annotate([trajectory])
    assert made.loss().objective == {"is_cap": cap}
    found = trajectory.annotations.get("rollout_logprobs")
    assert found is None if cap is None else found is trajectory.logprobs


@pytest.mark.parametrize(
    "other, said",
    [
        ("objective=jsd", "objective=jsd compares whole distributions"),
        ("reward.terminal_stop=relabel", "reward.terminal_stop=relabel scores another one"),
    ],
)
def test_a_weight_without_a_ratio_is_refused(other, said):
    with pytest.raises(ConfigError, match=said):
        OnPolicyDistillation.check(compose(["recipe=opd", "reward.importance_cap=2", other]))


# Layouts


LAYOUTS = {"null": "hf", "grouped": "streaming", "batch": "streaming", "interleaved": "hf"}
LAYOUTS |= {"scheduled": "simultaneous"}


RECIPES = {recipe_values(recipe)["trainer"]: recipe for recipe in reversed(recipes())}


@pytest.mark.parametrize("trainer", ["hrpo", "streaming_sft", "proactivellm"])
def test_a_method_takes_its_layouts_and_refuses_others_in_one_line(trainer):
    layouts, taken = TRAINERS.resolve(trainer).layouts, set()
    for layout, engine in LAYOUTS.items():
        overrides = f"streaming.layout={layout}", f"rollout.engine={engine}"
        try:
            config = compose([f"recipe={RECIPES[trainer]}", *overrides])
            check_layout(config, TRAINERS.resolve(trainer))
            taken.add(layout)
        except ConfigError as error:
            assert "\n" not in str(error)
    assert taken == set(layouts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_from_outside_has_the_layouts_of_its_method(
    overrides, streaming_model, monkeypatch, trainer, layout
):
    """Without sections it reads all keys, and so takes every value of `streaming.layout`."""
    base = TRAINERS.resolve(trainer)
    module = importlib.import_module(base.__module__)
    # Without what a method reads beside the data.
    outside = type("Outside", (base,), {"prepare": Trainer.prepare})
    monkeypatch.setattr(module, "Outside", outside, raising=False)
    keys = {
        "recipe": RECIPES[trainer],
        "trainer": f"{base.__module__}.Outside",
        "model.path": streaming_model,
        "teacher.path": streaming_model,
        "streaming.layout": layout,
        "rollout.engine": LAYOUTS[layout],
        "rollout.samples_per_prompt": 2,
        "teacher.cache": "unread",
        "data.path": "translation" if layout == "scheduled" else "stories",
        "data.stories": 8,
        "train.minibatches": 1,
        "eval.every": -1,
    }
    if trainer == "proactivellm":
        keys["proactive.curve"] = "[]"
    arguments = overrides(**keys)
    if (None if layout == "null" else layout) in base.layouts:
        assert prepare(compose(arguments)).mode.config.streaming.layout in base.layouts
    else:
        with pytest.raises(ConfigError, match=r"^streaming\.layout=\w+: recipe=\w+ needs "):
            prepare(compose(arguments))
