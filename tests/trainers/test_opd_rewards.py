"""Selected tokens (DIAL-OPD), the sign reward (TV-OPD), and a task reward beside the teacher:
against their formulas, enumerated over a small vocabulary."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recipes.compose import compose
from recipes.errors import ConfigError
from rewards.groups import group_advantages
from rewards.selection import Dial, select_tokens
from rollouts.trajectory import Trajectory
from trainers.core.batching import pack
from trainers.core.metrics import TokenStats
from trainers.core.updates import normalize
from trainers.grpo import GRPO
from trainers.modes import reading_mode
from trainers.opd import OnPolicyDistillation, select, total_variation
from trainers.prepare import prepare
from trainers.run import Run

VOCAB, WIDTH = 11, 6
CPU = torch.device("cpu")


def random_logprobs(count):
    return np.log(np.random.default_rng(count).random(count))


def dial(beta, teacher, student):
    return Dial(SimpleNamespace(beta=beta))(teacher, student)


@pytest.mark.parametrize("beta", [0, 0.5, 1, 1.2])
def test_the_dial_score_is_its_formula(beta):
    teacher, student = random_logprobs(40), random_logprobs(41)[:40]
    gap, difference = np.abs(teacher - student), np.abs(np.exp(teacher) - np.exp(student))
    scores = np.exp(dial(beta, teacher, student))
    np.testing.assert_allclose(scores, gap ** (1 - beta) * difference**beta, rtol=1e-12)
    mean = difference / gap
    np.testing.assert_allclose(scores, mean**beta * gap, rtol=1e-12)


@pytest.mark.parametrize("beta", [0, 0.5, 1, 1.2])
def test_the_dial_score_at_the_edges(beta):
    never, tiny = -np.inf, -900.0
    teacher = np.array([-1.0, never, never, tiny, -1.0, -1e-9], dtype=np.float32)
    student = np.array([-1.0, never, -0.5, 2 * tiny, -1.1, -2e-9], dtype=np.float32)
    scores = dial(beta, teacher, student)
    assert not np.isnan(scores).any()
    # Where both models agree there is nothing to learn, and the probabilities of tiny ones do not
    # underflow.
    assert (scores[:2] == -np.inf).all() and np.isfinite(scores[3:]).all()
    assert scores[2] > scores[4] or beta > 1


def test_the_highest_scores_are_selected_among_the_unmasked():
    scores = np.array([5.0, 1, 9, 3, 3, 8])
    mask = np.array([True, True, False, True, True, True])
    chosen = {
        share: np.flatnonzero(select_tokens(scores, mask, share)).tolist() for share in (0.4,)
    }
    assert chosen[0.4] == [0, 5]
    # One at least; of equal scores the earlier.
    assert np.flatnonzero(select_tokens(scores, mask, 0.01)).tolist() == [5]
    assert np.flatnonzero(select_tokens(scores, mask, 0.6)).tolist() == [0, 3, 5]
    assert np.array_equal(select_tokens(scores, mask, 1.0), mask)
    assert not select_tokens(scores, np.zeros(6, dtype=bool), 0.4).any()


def method_of(*overrides):
    config = compose(["train.minibatches=1", *overrides])
    run = Run(config=config, mode=reading_mode(config), vocab=VOCAB, teacher_stop=0)
    trainer = GRPO if config.trainer == "grpo" else OnPolicyDistillation
    return trainer(run)


def head_and_hidden(tokens, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    return SimpleNamespace(weight=weight, bias=None, softcap=None), hidden


def completions(lengths):
    rng = np.random.default_rng(0)
    made = []
    for sample, length in enumerate(lengths):
        ids = rng.integers(1, VOCAB, length).tolist()
        made.append(Trajectory(0, sample, [1, 2], ids, "length", score=float(sample % 3 == 0)))
    return made


def gradient(loss, head, hidden):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (head.weight, hidden))])


def test_dial_divides_by_the_selected_tokens_of_the_whole_update():
    """Loss = -(1/M) sum over selected of sg[log p - log q] log q, M over both responses."""
    trainer = method_of("recipe=dial_opd", "reward.select.keep=0.3")
    trajectories = completions([10, 3])
    head, hidden = head_and_hidden(13)
    logprobs = (hidden @ head.weight.T).log_softmax(-1)
    teacher = torch.from_numpy(random_logprobs(13))
    ids = torch.tensor([i for t in trajectories for i in t.completion_ids])
    student = logprobs.gather(-1, ids[:, None])[:, 0]
    kept = []
    for trajectory, lp, lq in zip(
        trajectories, teacher.split([10, 3]), student.detach().split([10, 3])
    ):
        trajectory.annotations["mask"] = trajectory.sampled_mask
        trajectory.annotations["teacher_logprobs"] = lp.float().numpy()
        trajectory.annotations["student_logprobs"] = lq.float().numpy()
        select(trajectory, trainer.score, 0.3)
        scores = (lp.exp() - lq.exp()).abs()
        count = {10: 3, 3: 1}[len(lp)]
        kept.append(scores >= scores.sort().values[-count])
        assert trajectory.annotations["mask"].tolist() == kept[-1].tolist()
        assert trajectory.annotations["candidates"].all()
    kept = torch.cat(kept)
    divisor, _, _ = normalize(trajectories, "token_mean", [[0, 1]])
    assert divisor == 4
    batch = pack(trajectories, [0, 1], CPU)
    batch.annotations["teacher_logprobs"] = teacher
    found = gradient(trainer.loss()(head, hidden, batch, divisor)["loss"], head, hidden)
    head, hidden = head_and_hidden(13)
    student = (hidden @ head.weight.T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    expected = -((teacher - student.detach()) * student * kept).sum() / 4
    torch.testing.assert_close(found, gradient(expected, head, hidden), atol=1e-9, rtol=1e-8)


def test_the_expected_gradient_of_the_sign_is_that_of_total_variation():
    """E_q[c sign(log p - log q) grad log q] = -2c grad TV, and E_q[max(0, 1 - p/q)] = TV."""
    logits = torch.randn(VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    p = torch.randn(VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    p = p.softmax(0)
    q = logits.softmax(0)
    distance = (p - q).abs().sum() / 2
    reward = method_of("recipe=opd_tv", "reward.sign_scale=0.7").reward
    with torch.no_grad():
        rewards = reward(p.log(), q.log())
    (expected,) = torch.autograd.grad(0.7 * 2 * distance, logits, retain_graph=True)
    surrogate = -(q.detach() * rewards * q.log()).sum()
    (found,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    q, p = q.detach().numpy(), p.numpy()
    distance = float(distance.detach())
    assert (q * total_variation(np.log(p), np.log(q))).sum() == pytest.approx(distance)


def annotated(trainer, trajectories, lengths):
    """The trajectories as `draw` and `annotate` leave them, without a model."""
    advantages = np.repeat(trainer.task_advantages(trajectories), lengths).astype(np.float32)
    for trajectory, values in zip(trajectories, np.split(advantages, np.cumsum(lengths)[:-1])):
        teacher = random_logprobs(len(values)).astype(np.float32)
        trajectory.annotations |= {
            "mask": trajectory.sampled_mask,
            "teacher_logprobs": teacher,
            "teacher_max_logprobs": teacher,
            "task_advantages": values,
            "advantages": values,
        }
    return pack(trajectories, range(len(lengths)), CPU)


@pytest.mark.parametrize(("teacher", "task"), [(1, 0.5), (0.25, 2), (0, 1)])
def test_task_and_teacher_add_up(teacher, task):
    lengths = [4, 5, 2, 6]
    trainer = method_of(
        "recipe=poweropd",
        "rollout.samples_per_prompt=4",
        f"reward.task_weight={task}",
        f"reward.teacher_weight={teacher}",
    )
    trajectories = completions(lengths)
    batch = annotated(trainer, trajectories, lengths)
    head, hidden = head_and_hidden(17)
    output = trainer.loss()(head, hidden, batch, 17.0)
    found = gradient(output["loss"], head, hidden)
    head, hidden = head_and_hidden(17)
    student = (hidden @ head.weight.T).log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    lp, lq = batch.annotations["teacher_logprobs"].double(), student.detach()
    groups = group_advantages(np.array([[t.score for t in trajectories]])).ravel()
    advantages = torch.from_numpy(np.repeat(groups, lengths).astype(np.float32)).double()
    rewards = teacher * (lp.exp() ** 5 - lq.exp() ** 5) + task * advantages
    expected = gradient(-(rewards * student).sum() / 17, head, hidden)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
    # Both parts are logged apart.
    stats = TokenStats(40)
    arrays = {name: t.float().numpy() for name, t in output.items() if name != "loss"}
    means = trainer.token_metrics(trajectories[0], {n: a[:4] for n, a in arrays.items()})
    stats.update(trajectories[0], {n: a[:4] for n, a in arrays.items()}, means=means)
    row = stats.metrics()
    parts = (teacher * (lp.exp() ** 5 - lq.exp() ** 5))[:4].mean(), abs(task * groups[0])
    assert row["reward/teacher_mean"] == pytest.approx(float(parts[0]), abs=1e-6)
    assert row["reward/task_abs_mean"] == pytest.approx(parts[1], rel=1e-5)


def test_without_the_teachers_weight_it_is_grpo():
    lengths = [4, 5, 2, 6]
    samples = "rollout.samples_per_prompt=4"
    mixed = method_of("recipe=poweropd", samples, "reward.task_weight=1", "reward.teacher_weight=0")
    grpo = method_of("recipe=grpo", samples, "grpo.kl_beta=0", "grpo.gamma=0")
    drawn = completions(lengths)
    own = mixed.task_advantages(drawn).astype(np.float32)
    assert np.array_equal(own, [a[0] for a in grpo.advantages(drawn, 40)])
    batch = annotated(mixed, completions(lengths), lengths)
    found = []
    for trainer in (mixed, grpo):
        head, hidden = head_and_hidden(17)
        loss = trainer.loss()(head, hidden, batch, 17.0)["loss"]
        found.append(gradient(loss, head, hidden))
    assert torch.equal(*found)


def test_without_a_task_weight_nothing_is_added():
    trainer = method_of("recipe=poweropd")
    assert trainer.reward.fused and not trainer.needs_answers(trainer.config)


def test_what_is_compared_with_the_teacher_does_not_depend_on_the_selection():
    [trajectory] = completions([10])
    teacher, student = (random_logprobs(n)[:10].astype(np.float32) for n in (10, 12))
    trajectory.annotations |= {
        "mask": trajectory.sampled_mask,
        "teacher_logprobs": teacher,
        "teacher_max_logprobs": teacher,
        "student_logprobs": student,
    }
    rows = []
    for keep in (None, 0.2):
        trainer = method_of("recipe=opd", f"reward.select.score={'dial' if keep else 'null'}")
        if keep:
            select(trajectory, trainer.score, keep)
        mask = trajectory.annotations["mask"]
        output = {"logprobs": student * mask, "rewards": (teacher - student) * mask}
        stats = TokenStats(40)
        stats.update(trajectory, output, means=trainer.token_metrics(trajectory, output))
        rows.append(stats.metrics())
    for name in ("teacher/kl", "teacher/tv", "teacher/agreement"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-6)
    assert rows[1]["reward/selected_frac"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward.task_weight": 1}, "rollout.samples_per_prompt=1: reward.task_weight=1 compares"),
        ({"reward.teacher_weight": 0}, "leave no reward"),
        ({"reward.select.score": "dial", "objective": "jsd"}, "reward.select.score is of the"),
        ({"reward.select.score": "dail"}, "reward.select.score=dail is not known"),
        ({"reward.select.keep": 0}, "reward.select.keep=0"),
    ],
)
def test_impossible_settings(overrides, changes, said):
    arguments = [*overrides(), *(f"{name}={value}" for name, value in changes.items())]
    with pytest.raises(ConfigError) as caught:
        prepare(compose(arguments))
    assert said in str(caught.value) and "\n" not in str(caught.value)
