"""The three primitives against autograd of the formula, and the stop modes, on a toy head."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recipes.components import TOKEN_REWARDS
from recipes.compose import compose
from recipes.errors import ConfigError
from rollouts.trajectory import Trajectory
from trainers.losses import Loss
from trainers.opd import OnPolicyDistillation, annotate_stop, standardise

T, H, V, HT = 17, 6, 23, 5


@pytest.fixture
def toy():
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    head = SimpleNamespace(weight=make(V, H).requires_grad_(), bias=None, softcap=None)
    teacher = SimpleNamespace(weight=make(V, HT), bias=None, softcap=None)
    hidden, teacher_hidden = make(T, H).requires_grad_(), make(T, HT)
    targets = torch.randint(V, (T,))
    mask = torch.rand(T) > 0.3
    teacher_logprobs = (
        (teacher_hidden @ teacher.weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    )
    annotations = {
        "mask": mask,
        "teacher_logprobs": teacher_logprobs,
        "teacher_hidden": teacher_hidden,
        "advantages": make(T),
        "ce_weights": torch.rand(T, dtype=torch.float64),
    }
    return SimpleNamespace(
        head=head,
        teacher=teacher,
        hidden=hidden,
        mask=mask,
        batch=SimpleNamespace(targets=targets, mask=mask, annotations=annotations),
    )


def gradients(toy, loss):
    grads = torch.autograd.grad(loss, (toy.hidden, toy.head.weight))
    return torch.cat([g.flatten() for g in grads])


def logprobs(toy):
    return (toy.hidden @ toy.head.weight.T).log_softmax(-1)


@pytest.mark.parametrize("name", ["power", "log_ratio", "clip", "tanh"])
@pytest.mark.parametrize("fused", [True, False])
def test_policy_gradient_is_reinforce_with_the_token_reward(toy, name, fused):
    reward = TOKEN_REWARDS.resolve(name)(compose(["reward.alpha=3", "reward.clip=0.5"]).reward)
    annotations = {n: v for n, v in toy.batch.annotations.items() if n != "advantages"}
    toy.batch.annotations = annotations
    sampled = logprobs(toy).gather(-1, toy.batch.targets[:, None])[:, 0]
    lp, lq = annotations["teacher_logprobs"], sampled.detach()
    r = {
        "power": lp.exp() ** 3 - lq.exp() ** 3,
        "log_ratio": lp - lq,
        "clip": (lp - lq).clamp(-0.5, 0.5),
        "tanh": torch.tanh((lp - lq) / 5),
    }[name]
    expected = gradients(toy, -(sampled * r * toy.mask).sum() / 7)
    if not fused:
        plain = reward
        reward = type(
            "Custom",
            (),
            {"fused": None, "window": False, "__call__": lambda self, a, b: plain(a, b)},
        )()
    output = Loss(policy_gradient=True, reward=reward)(toy.head, toy.hidden, toy.batch, 7.0)
    torch.testing.assert_close(gradients(toy, output["loss"]), expected, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(output["rewards"][toy.mask], r[toy.mask], atol=1e-10, rtol=1e-8)


def test_cross_entropy_and_policy_gradient_add_up(toy):
    annotations = toy.batch.annotations
    sampled = logprobs(toy).gather(-1, toy.batch.targets[:, None])[:, 0]
    expected = gradients(
        toy,
        -(sampled * (annotations["advantages"] + annotations["ce_weights"]) * toy.mask).sum() / 5,
    )
    output = Loss(policy_gradient=True, cross_entropy=True)(toy.head, toy.hidden, toy.batch, 5.0)
    torch.testing.assert_close(gradients(toy, output["loss"]), expected, atol=1e-10, rtol=1e-8)


def test_cross_entropy_beside_a_reward_without_a_kernel_is_not_lost(toy):
    """It was dropped in silence where the reward's gradient goes through the log-probs."""
    annotations = toy.batch.annotations
    sampled = logprobs(toy).gather(-1, toy.batch.targets[:, None])[:, 0]
    gap = annotations["teacher_logprobs"] - sampled.detach()
    given = gap + annotations["advantages"] + annotations["ce_weights"]
    expected = gradients(toy, -(sampled * given * toy.mask).sum() / 5)
    plain = type(
        "Plain", (), {"fused": None, "window": False, "__call__": lambda self, p, q: p - q}
    )()
    loss = Loss(policy_gradient=True, cross_entropy=True, reward=plain)
    output = loss(toy.head, toy.hidden, toy.batch, 5.0)
    torch.testing.assert_close(gradients(toy, output["loss"]), expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize(
    "kind", ["reverse_kl", "forward_kl", "jsd", "power", "topk_teacher", "topk_student"]
)
def test_divergences_are_the_formula_on_full_distributions(toy, kind):
    ls = logprobs(toy)
    lt = (toy.batch.annotations["teacher_hidden"] @ toy.teacher.weight.T).log_softmax(-1)
    p, q = lt.exp(), ls.exp()
    options = {"divergence": kind}
    if kind == "reverse_kl":
        values = (q * (ls - lt)).sum(-1)
    elif kind == "forward_kl":
        values = (p * (lt - ls)).sum(-1)
    elif kind == "jsd":
        m = (0.5 * (p + q)).log()
        values = 0.5 * (p * (lt - m)).sum(-1) + 0.5 * (q * (ls - m)).sum(-1)
        options["beta"] = 0.5
    elif kind == "power":
        a = 2.0
        # alpha * B
        values = (q ** (a + 1) - (a + 1) * q * p**a + a * p ** (a + 1)).sum(-1) / (a + 1)
        options |= {"alpha": a, "normalization": "none"}
    else:
        support = (lt if kind == "topk_teacher" else ls.detach()).topk(4).indices
        s, t = (x.gather(-1, support) for x in (ls, lt))
        s, t = s - s.logsumexp(-1, keepdim=True), t - t.logsumexp(-1, keepdim=True)
        values = (s.exp() * (s - t)).sum(-1)
        options = {
            "divergence": "reverse_kl",
            "top_k": 4,
            "support": kind[5:],
            "tail": "renormalize",
        }
    expected = gradients(toy, (values * toy.mask).sum() / 7)
    output = Loss(divergence=options, teacher_head=toy.teacher)(
        toy.head, toy.hidden, toy.batch, 7.0
    )
    torch.testing.assert_close(gradients(toy, output["loss"]), expected, atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(
        output["divergence"][toy.mask], values.detach()[toy.mask], atol=1e-8, rtol=1e-6
    )


STOP, TEACHER_STOP = 9, 8


@pytest.mark.parametrize(
    "mode, mask, target, teacher_target",
    [
        ("raw", True, STOP, STOP),
        ("mask", False, STOP, STOP),
        ("relabel", True, TEACHER_STOP, TEACHER_STOP),
        ("cross_eos", True, STOP, TEACHER_STOP),
    ],
)
def test_the_terminal_stop_modes_touch_the_last_token_alone(mode, mask, target, teacher_target):
    trajectory = Trajectory(0, 0, [1], [4, 5, STOP], "stop")
    annotate_stop(trajectory, mode, TEACHER_STOP)
    annotations = trajectory.annotations
    assert annotations["mask"].tolist() == [True, True, mask]
    assert annotations["targets"].tolist() == [4, 5, target]
    assert annotations["teacher_targets"].tolist() == [4, 5, teacher_target]


@pytest.mark.parametrize("mode", ["raw", "mask", "relabel", "cross_eos"])
def test_a_truncated_completion_has_no_stop_to_treat(mode):
    trajectory = Trajectory(0, 0, [1], [4, 5, 6], "length")
    annotate_stop(trajectory, mode, TEACHER_STOP)
    assert trajectory.annotations["mask"].all()
    assert trajectory.annotations["teacher_targets"].tolist() == [4, 5, 6]


def test_zscore_has_mean_zero_and_unit_spread_over_unmasked_tokens():
    rng = np.random.default_rng(0)
    reward = TOKEN_REWARDS.resolve("zscore")(compose([]).reward)
    trajectories = []
    for count in (5, 9, 3):
        trajectory = Trajectory(0, 0, [1], [1] * count, "length")
        trajectory.annotations = {
            "mask": rng.random(count) > 0.3,
            "teacher_logprobs": -rng.random(count).astype(np.float32) * 4,
            "student_logprobs": -rng.random(count).astype(np.float32) * 4,
        }
        trajectories.append(trajectory)
    standardise(trajectories, reward)
    advantages = np.concatenate(
        [t.annotations["advantages"][t.annotations["mask"]] for t in trajectories]
    )
    assert abs(advantages.mean()) < 1e-6 and advantages.std() == pytest.approx(1, abs=1e-5)


def test_a_full_distribution_objective_has_no_sampled_stop_to_rescore():
    with pytest.raises(ConfigError, match="reward.terminal_stop=cross_eos"):
        OnPolicyDistillation.check(
            compose(["objective=reverse_kl", "reward.terminal_stop=cross_eos"])
        )
