"""Several teachers: each row has its own, or all of them are averaged."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recipes.compose import compose, to_yaml
from recipes.errors import CheckpointError, ConfigError, DataError, ModelError
from rollouts.trajectory import Trajectory
from trainers.conformance.stand_ins import TinyTeacher
from trainers.conformance.subjects import Setup
from trainers.conformance.world import PROMPTS, TinyPolicy, tree
from trainers.core.resting import Resting
from trainers.core.teachers import Teachers, make_one, make_teachers, teacher_sections
from trainers.loop import Loop
from trainers.prepare import prepare

PAIR = ("teachers.first.path=a", "teachers.second.path=b")


def refused(*overrides):
    with pytest.raises(ConfigError) as caught:
        config = compose(overrides)
        from trainers.opd import OnPolicyDistillation

        OnPolicyDistillation.check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_teachers_have_names_and_are_otherwise_as_the_section_teacher():
    given = "math.path=a b,c", "co-de.path=d", "co-de.weight=2", "math.dtype=bfloat16"
    named = [f"teachers.{override}" for override in given]
    config = compose([*named, "teacher.trust_remote_code=true"])
    math, code = teacher_sections(config).values()
    assert list(teacher_sections(config)) == ["teachers.math", "teachers.co-de"]
    assert (math.path, math.dtype, code.dtype) == ("a b,c", "bfloat16", "float32")
    assert math.trust_remote_code and config.teachers["co-de"].weight == 2
    assert "teachers:\n  math:\n    path: a b,c\n" in to_yaml(config)
    assert list(teacher_sections(compose([]))) == ["teacher"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teachers.math.weight=2"], "teachers.math.path has no value"),
        (["teachers.math.pth=a"], "there is no key 'teachers.math.pth'"),
        (["teachers.1.path=a"], "there is no key 'teachers.1.path'"),
        (["teachers=a"], "'teachers' is a section"),
        (["recipe=grpo", "teachers.math.path=a"], "is not read by recipe=grpo; recipe=poweropd"),
        ([*PAIR, "teachers.first.weight=0"], "teachers.first.weight=0.0 must be above 0"),
        ([*PAIR, "teachers.first.weight=x"], "teachers.first.weight: Value 'x'"),
        ([*PAIR, "teachers.first.dtype=int8"], "teachers.first.dtype=int8 is not known"),
        (["teacher.route=kind"], "teacher.route=kind is of several teachers"),
        (
            ["teacher.rest=true", "teacher.url=http://a/v1"],
            "teacher.rest=true is of a frozen teach",
        ),
        (["teacher.average=probabilities"], "teacher.average=probabilities is of several"),
        ([*PAIR, "objective=jsd"], "objective=jsd compares whole distributions"),
        ([*PAIR, "teacher.weights=base"], "teacher.weights=base is of one teacher"),
        (
            [*PAIR, "teacher.route=kind", "teachers.second.weight=3"],
            "teachers.second.weight=3 is of a mean over teachers, and teacher.route=kind",
        ),
        (
            [*PAIR, "teacher.route=kind", "teacher.average=probabilities"],
            "teacher.average=probabilities is of a mean over teachers",
        ),
    ],
)
def test_keys_that_are_impossible_together(overrides, said):
    assert said in refused(*overrides)


# The weights of the teachers, 1 and 3 of 4.
WEIGHTS = (0.25, 0.75)
EXACT = ("reward.terminal_stop=raw", *PAIR, "teachers.second.weight=3")


def exact_setup(*overrides, **options):
    """A trainer with two tiny teachers."""
    setup = Setup((*EXACT, *overrides), **options)
    policies = [TinyPolicy(seed, width=5, float32_states=True) for seed in (2, 7)]
    made = iter(policies)
    setup.run.teacher = Teachers(setup.run, lambda section: TinyTeacher(setup.run, next(made)))
    return setup, policies


@pytest.mark.parametrize("token", ["power", "log_ratio", "tanh", "sign"])
@pytest.mark.parametrize("average", ["rewards", "probabilities"])
def test_the_expected_gradient_is_that_of_the_weighted_mean(token, average):
    """Over all completions of three tokens, enumerated."""
    setup, policies = exact_setup(
        f"reward.token={token}", f"teacher.average={average}", "reward.teacher_weight=2"
    )
    student = setup.exact().student.detach()
    with torch.no_grad():
        teachers = [tree(3).log_probs(policy, PROMPTS[0]) for policy in policies]
    probabilities = sum(w * lp.exp() for w, lp in zip(WEIGHTS, teachers))
    p, q = probabilities, student.exp()

    def reward(teacher):
        gap = teacher - student
        return {
            "power": teacher.exp() ** 5 - q**5,
            "log_ratio": gap,
            "tanh": torch.tanh(gap / 5),
            "sign": gap.sign(),
        }[token]

    if average == "rewards":
        expected = sum(w * reward(lp) for w, lp in zip(WEIGHTS, teachers))
    else:
        expected = reward(p.log())
    gradient = 2 * setup.exact().of_rewards(expected)
    torch.testing.assert_close(setup.expected(), gradient, rtol=1e-9, atol=1e-12)
    # The two means are different ones, so that one test cannot pass for the other.
    other = reward(p.log()) if average == "rewards" else sum(map(reward, teachers)) / 2
    assert (2 * setup.exact().of_rewards(other) - gradient).norm() > 1e-3 * gradient.norm()


def test_standardised_rewards_are_averaged_before_they_are_standardised():
    setup, policies = exact_setup("reward.token=zscore", samples=2, limit=2)
    nodes = tree(2)
    long = [one for one in nodes.completions if len(one.ids) == 2]
    drawn = setup.draw((long[0], long[-1]))
    update = setup.update(drawn)
    values = []
    for trajectory, _ in update.outputs:
        places, ids = zip(*_steps(trajectory, nodes))
        with torch.no_grad():
            lq = nodes.log_probs(setup.policy, PROMPTS[0])[list(places), list(ids)]
            taught = [nodes.log_probs(p, PROMPTS[0])[list(places), list(ids)] for p in policies]
        values.append(sum(w * (lp - lq) for w, lp in zip(WEIGHTS, taught)))
    flat = torch.cat(values)
    expected = (flat - flat.mean()) / (flat.std(correction=0) + 1e-6)
    found = np.concatenate([output["rewards"] for _, output in update.outputs])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def _steps(trajectory, nodes):
    """The place and the id of each token."""
    [completion] = [c for c in nodes.completions if list(c.ids) == trajectory.completion_ids]
    return zip(completion.places, completion.ids)


def test_selection_and_metrics_see_the_mixture_and_each_teacher():
    setup, policies = exact_setup("recipe=dial_opd", "reward.select.keep=0.5", samples=1, limit=3)
    long = next(one for one in tree(3).completions if len(one.ids) == 3)
    [(trajectory, output)] = setup.update(setup.draw((long,))).outputs
    with torch.no_grad():
        each = [
            tree(3).log_probs(policy, PROMPTS[0])[list(long.places), list(long.ids)].numpy()
            for policy in policies
        ]
    annotations = trajectory.annotations
    mixture = np.log(sum(w * np.exp(lp) for w, lp in zip(WEIGHTS, each)))
    np.testing.assert_allclose(annotations["teacher_logprobs"], mixture, rtol=1e-12)
    assert "teacher_max_logprobs" not in annotations and annotations["mask"].sum() == 2
    metrics = setup.trainer.token_metrics(trajectory, output)
    for name, lp in zip(("first", "second"), each):
        kl, counted = metrics[f"teacher/{name}/kl"]
        np.testing.assert_allclose(kl, annotations["student_logprobs"] - lp, rtol=1e-12)
        assert counted.all() and metrics[f"teacher/{name}/share"][0].tolist() == [1.0] * 3
        rewards, counted = metrics[f"teacher/{name}/reward_mean"]
        np.testing.assert_allclose(rewards[counted], -kl[counted], rtol=1e-9)


ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_a_teacher_rests_on_the_cpu(device):
    module = torch.nn.Linear(3, 2).to(device)
    module.register_buffer("table", torch.ones(2, device=device), persistent=False)
    tensors = [*module.parameters(), *module.buffers()]
    resting = Resting(module, torch.device(device))
    before = [tensor.data_ptr() for tensor in tensors]
    for _ in range(2):
        with resting:
            assert {tensor.device.type for tensor in tensors} == {device}
            assert module(torch.ones(3, device=device)).shape == (2,)
        # Nothing is copied back, and on a CPU nothing is copied at all.
        assert {tensor.device.type for tensor in tensors} == {"cpu"}
        assert [tensor.data_ptr() for tensor in tensors] == before


def test_each_takes_its_turn_once_a_step():
    setup, _ = exact_setup(samples=2)
    sections = teacher_sections(setup.run.config).values()
    assert [section.rest for section in sections] == [True, True]
    turns = []
    for name, teacher in setup.run.teacher.by_name.items():
        teacher.resting = _Turn(name, turns)
    long = tree(3).completions[-1]
    setup.update(setup.draw((long, long)))
    assert turns == ["+first", "-first", "+second", "-second"]


class _Turn:
    def __init__(self, name, turns):
        self.name, self.turns = name, turns

    def __enter__(self):
        self.turns.append(f"+{self.name}")

    def __exit__(self, *_):
        self.turns.append(f"-{self.name}")


@pytest.fixture
def models(tiny_models):
    """Two teachers with other weights."""
    return [f"teachers.math.path={tiny_models['teacher']}", f"teachers.own.path={'self'}"]


@pytest.fixture
def rows(tmp_path):
    """A file whose rows take turns in naming teachers; returns its path."""

    def write(*kinds):
        made = zip(range(16), itertools.cycle(kinds))
        lines = [{"prompt": f"{n} + 1", "answer": f"{n + 1}", "kind": kind} for n, kind in made]
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in lines))
        return f"data.path={file}"

    return write


QUICK = {"rollout__engine": "hf", "eval__every": -1}


def test_a_row_is_scored_by_the_teacher_that_it_names(overrides, models, rows):
    data = [rows("math", "own", "own"), "teacher.route=kind"]
    run = prepare(compose([*overrides(**QUICK), *models, *data]))
    assert any("by column kind; teacher.path is not read" in text for text in run.messages)
    teachers = make_teachers(run, lambda _: None)
    rng, made = np.random.default_rng(0), []
    for prompt in run.prompts[:6]:
        ids = rng.integers(3, 400, 9)
        made.append(Trajectory(prompt.index, 0, list(prompt.token_ids), ids.tolist(), "length"))
        made[-1].annotations |= {"teacher_targets": ids, "mask": np.ones(9, bool)}
    teachers.annotate(made)
    found = [trajectory.annotations["teacher_logprobs"] for trajectory in made]
    names = ["math", "own", "own"] * 2
    sections = dict(zip(("math", "own"), teacher_sections(run.config).values()))
    for name, section in sections.items():
        alone = make_one(section, run)
        alone.annotate(made)
        for own, trajectory, scores in zip(names, made, found):
            same = np.allclose(trajectory.annotations["teacher_logprobs"], scores, atol=1e-6)
            assert same == (own == name)
    metrics = teachers.token_metrics(made[1], np.zeros(9, np.float32), None)
    assert metrics["teacher/math/share"][0].sum() == 0 and "teacher/math/kl" not in metrics
    assert metrics["teacher/own/share"][0].sum() == 9 and "teacher/own/kl" in metrics


@pytest.mark.parametrize(
    ("kinds", "route", "said"),
    [
        (("math", "code"), "kind", "row 1 names 'code' in column 'kind' (teacher.route); the "),
        (("math", None), "kind", "row 1 names no teacher in column 'kind'"),
        (("math",), "sort", "no column 'sort' (teacher.route); its columns: "),
    ],
)
def test_a_row_that_names_no_teacher_is_refused(overrides, models, rows, kinds, route, said):
    keys = [*overrides(**QUICK), *models, rows(*kinds), f"teacher.route={route}"]
    with pytest.raises(DataError) as caught:
        prepare(compose(keys))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    if route == "kind":
        assert str(caught.value).endswith("the teachers are math, own")


def test_generated_data_names_no_teachers(overrides, models):
    with pytest.raises(DataError, match="is generated and has no columns"):
        prepare(compose([*overrides(**QUICK), *models, "teacher.route=kind"]))


def test_each_teacher_is_checked_and_named_in_the_refusal(overrides, models):
    other = "teachers.last.path=translation-untrained"
    with pytest.raises(ModelError, match="^teachers.last.path=translation-untrained has another"):
        prepare(compose([*overrides(**QUICK), *models, other]))
    wrong = ["teachers.last.path=no_such_model", "model.attn_implementation=packed"]
    with pytest.raises(ModelError, match="teachers.last.path=no_such_model"):
        prepare(compose([*overrides(**QUICK), *models, *wrong]))
    flash = ["model.attn_implementation=flash_attention_2", "model.dtype=bfloat16"]
    with pytest.raises(ConfigError, match="and teachers.own.dtype=float32"):
        prepare(compose([*overrides(**QUICK), *models, *flash, "teachers.math.dtype=bfloat16"]))


def test_teachers_with_other_end_tokens_are_refused_where_these_are_scored(overrides, models):
    keys = [*overrides(**QUICK), *models, "reward.terminal_stop=cross_eos"]
    with pytest.raises(ConfigError) as caught:
        prepare(compose(keys))
    assert "the teachers have different ones: " in str(caught.value)
    assert "of teachers.math, " in str(caught.value)


def trained(overrides, tmp_path, name, *keys):
    """The rows of two steps without times, and the loop."""
    folder = tmp_path / name
    loop = Loop(prepare(compose([*overrides(**QUICK, run__dir=folder), *keys])))
    loop.fit()
    loop.finish()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [
        {key: value for key, value in json.loads(line).items() if key[:5] not in ("time/", "perf/")}
        for line in lines
    ]
    return rows, loop


@pytest.mark.parametrize("objective", ["policy_gradient", "reverse_kl"])
def test_a_single_teacher_that_rests_gives_the_same_bits(overrides, tmp_path, objective):
    keys = [f"objective={objective}", "train.lr=1e-2"]
    always, first = trained(overrides, tmp_path, "always", *keys)
    rested, second = trained(overrides, tmp_path, "rested", *keys, "teacher.rest=true")
    assert type(second.run.teacher.resting) is Resting
    # The head of a loss that reads the teacher's whole distribution is not moved.
    moved = {id(tensor) for tensor, _ in second.run.teacher.resting.kept}
    assert (id(second.run.teacher.head.weight) in moved) == (objective == "policy_gradient")
    assert rested == always and always[0]["train/loss"] != 0
    for name, weight in weights_of(first).items():
        assert torch.equal(weight, weights_of(second)[name])


def weights_of(loop):
    return dict(loop.engine.policy.named_parameters())


def test_one_teacher_by_name_is_the_one_of_teacher_path_to_the_bit(
    overrides, tmp_path, tiny_models
):
    keys = ["reward.token=log_ratio", "train.lr=1e-2"]
    alone, first = trained(overrides, tmp_path, "alone", *keys)
    path = f"teachers.only.path={tiny_models['teacher']}"
    named, second = trained(overrides, tmp_path, "named", *keys, path)
    assert len(alone) == 2 and alone[0]["train/loss"] != 0
    for before, after in zip(alone, named):
        extra = {f"teacher/only/{end}" for end in ("share", "kl", "reward_mean")}
        assert after.keys() - before.keys() == extra
        assert {key: after[key] for key in before} == before
        assert after["teacher/only/kl"] == pytest.approx(before["teacher/kl"], rel=1e-9)
        assert after["teacher/only/reward_mean"] == pytest.approx(before["reward/mean"], rel=1e-6)
    for name, weight in weights_of(first).items():
        assert torch.equal(weight, weights_of(second)[name])


def test_two_teachers_train_and_a_resume_with_others_is_refused(overrides, models, rows, tmp_path):
    keys = [*models, rows("math", "own", "own", "own"), "teacher.route=kind"]
    keys += ["reward.token=log_ratio", "train.prompts_per_step=16"]
    made, _ = trained(overrides, tmp_path, "two", *keys, "checkpoint.every=2")
    for row in made:
        assert row["teacher/math/share"] + row["teacher/own/share"] == pytest.approx(1)
        assert 0.1 < row["teacher/math/share"] < 0.4
        together = sum(
            row[f"teacher/{name}/share"] * row[f"teacher/{name}/kl"] for name in ("math", "own")
        )
        assert together == pytest.approx(row["teacher/kl"], rel=1e-6)
    # The one of the start is itself.
    assert made[0]["teacher/own/kl"] == pytest.approx(0, abs=1e-6)
    folder = tmp_path / "two"
    again = [*overrides(**QUICK, run__dir=folder), *keys, "resume=auto"]
    assert prepare(compose(again)).start == 2
    for other in ("teachers.math.dtype=bfloat16", "teachers.own.path=stories-teacher"):
        with pytest.raises(CheckpointError) as caught:
            prepare(compose([*again, other]))
        said = str(caught.value)
        assert "was saved with teachers=math " in said and "\n" not in said
    with pytest.raises(CheckpointError, match="this run has None"):
        prepare(compose([*overrides(**QUICK, run__dir=folder), keys[2], "resume=auto"]))


def test_a_run_without_several_may_continue_an_older_one():
    from trainers.prepare import resume_facts

    assert resume_facts(compose([]))["teachers"] is None
    assert resume_facts(compose(["recipe=sft"]))["teachers"] is None
    assert resume_facts(SimpleNamespace(model=compose([]).model))["teachers"] is None
