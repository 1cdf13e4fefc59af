import math

import pytest
import torch

from benchmarks.kernels import reference
from kernels import (
    fused_linear_distillation_divergence,
    fused_linear_logprobs,
    fused_linear_opd_loss,
    log_ratio_reward,
    policy_gradient_loss,
    power_reward,
)

REWARDS = {
    "power": {"alpha": 2.0},
    "power_none": {"alpha": 5.0, "normalization": "none"},
    "limit": {"alpha": 0.0},
    "log_ratio": {"reward": "log_ratio"},
    "clip": {"reward": "log_ratio", "clip": 1.0},
    "tanh": {"reward": "log_ratio", "tanh_scale": 5.0},
    "advantages": {"reward": None},
}
OBJECTIVES = {
    "reinforce": {},
    "ppo": {"objective": "ppo_clip"},
    "dual": {"objective": "ppo_clip", "dual_clip": 1.5},
    "cispo": {"objective": "cispo", "clip_high": 0.5},
    "tis": {"is_cap": 1.05},
    "ppo_tis": {"objective": "ppo_clip", "is_cap": math.inf},
}


def run(p, naive_head, reward, objective, *, both=True, entropy_coef=0.0, **options):
    """One problem through the fused loss and through autograd of the unfused composition."""
    inputs = [x.detach().requires_grad_() for x in (p.hidden, p.weight)]
    bias = options.pop("bias", None)
    if bias is not None:
        inputs.append(bias.detach().requires_grad_())
    naive_head = dict(naive_head, bias=inputs[2] if bias is not None else None)
    full = torch.log_softmax(reference.head_logits(inputs[0], inputs[1], **naive_head), -1)
    lp = reference.picked(full, p.ids)
    old = lp.detach() + p.rand(p.T) * 0.4
    rollout = old + p.rand(p.T) * 0.2
    adv = p.advantages if both or reward.get("reward", "") is None else None
    on = {"old_logprobs": old, "rollout_logprobs": rollout if "is_cap" in objective else None}
    lt = None if reward.get("reward", "") is None else p.teacher_logprobs
    out = fused_linear_opd_loss(
        inputs[0],
        inputs[1],
        p.ids,
        lt,
        advantages=adv,
        weights=p.weights,
        mask=p.mask,
        denominator=11.0,
        loss_scale=0.5,
        entropy_coef=entropy_coef,
        return_entropy=True,
        bias=inputs[2] if bias is not None else None,
        **on,
        **reward,
        **objective,
        **options,
    )
    grads = torch.autograd.grad(out.loss, inputs, torch.tensor(3.0, dtype=torch.float64))

    rewards = reference.token_reward(p.teacher_logprobs, lp, **reward)
    total = rewards if adv is None else rewards + adv
    entropy = reference.entropy(full)
    per_token = reference.policy_loss(lp, total, old, rollout, **objective) - entropy_coef * entropy
    loss = (per_token * p.weights * p.mask).sum() * 0.5 / 11
    want = torch.autograd.grad(3 * loss, inputs)
    for got, exact in (
        (out.logprobs, lp),
        (out.rewards, rewards),
        (out.entropy, entropy),
    ):
        torch.testing.assert_close(got, exact.detach() * p.mask)
        assert not got.requires_grad
    torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grads, want, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reward", REWARDS)
def test_is_the_unfused_composition(problem, reward, objective):
    run(problem(30, 40, 5), {}, REWARDS[reward], OBJECTIVES[objective])
    run(problem(30, 40, 5), {}, REWARDS[reward], OBJECTIVES[objective], both=False)


@pytest.mark.parametrize("objective", ["reinforce", "ppo"])
def test_head_options_over_tiles_blocks_and_chunks(problem, head, objective):
    p = problem(300, 2100, 4)
    options, naive = head(p)
    run(
        p,
        naive,
        REWARDS["power"],
        OBJECTIVES[objective],
        entropy_coef=0.01,
        **options,
    )


def test_cross_entropy_is_the_special_case(problem):
    p = problem(20, 50, 6)
    inputs = [x.requires_grad_() for x in (p.hidden, p.weight)]
    out = fused_linear_opd_loss(
        *inputs, p.ids, reward=None, advantages=torch.ones(20), denominator=20
    )
    want = torch.nn.functional.cross_entropy(p.hidden @ p.weight.t(), p.ids)
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, inputs), torch.autograd.grad(want, inputs)
    )


@pytest.mark.parametrize("objective", ["reinforce", "ppo_clip"])
def test_gradcheck(problem, objective):
    """With given advantages only: a reward is a constant, which a numerical derivative does not
    know."""
    p = problem(3, 11, 5)
    inputs = [x.requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    old = torch.full((3,), -2.4)

    def loss(hidden, weight, bias):
        return fused_linear_opd_loss(
            hidden,
            weight,
            p.ids,
            reward=None,
            advantages=p.advantages,
            old_logprobs=old,
            bias=bias,
            mask=p.mask,
            temperature=1.2,
            logit_softcap=4.0,
            valid_vocab_size=11,
            entropy_coef=0.1,
            objective=objective,
            denominator=2.0,
        ).loss

    assert torch.autograd.gradcheck(loss, inputs)


def test_equals_the_kernels_it_fuses_bitwise(problem):
    """Same log-probs to the bit as scoring, so an on-policy ratio is exactly 1; same reward, same
    loss."""
    p = problem(150, 2500, 16, torch.float32)
    score = fused_linear_logprobs(p.hidden, p.weight, p.ids, return_entropy=True)
    old = score.logprobs
    for rows in (slice(None), slice(0, 65), slice(3, 4)):
        out = fused_linear_opd_loss(
            p.hidden[rows].requires_grad_(),
            p.weight,
            p.ids[rows],
            p.teacher_logprobs[rows],
            alpha=3.0,
            old_logprobs=old[rows],
            objective="ppo_clip",
            denominator=7,
            return_entropy=True,
        )
        assert torch.equal(out.logprobs, old[rows])
        assert torch.equal(out.entropy, score.entropy[rows])
        assert torch.equal(out.rewards, power_reward(p.teacher_logprobs, old, 3.0)[rows])
        assert out.stats["ratio_mean"] == 1 and out.stats["approx_kl"] == 0
        loss = policy_gradient_loss(
            old[rows], out.rewards, old_logprobs=old[rows], objective="ppo_clip", denominator=7
        ).loss
        assert torch.equal(out.loss, loss)
    out = fused_linear_opd_loss(
        p.hidden, p.weight, p.ids, p.teacher_logprobs, reward="log_ratio", denominator=1
    )
    assert torch.equal(out.rewards, log_ratio_reward(p.teacher_logprobs, old))


@pytest.mark.parametrize("needs", ["hidden", "weight", "both"])
def test_only_what_needs_a_gradient_gets_one(problem, needs):
    p = problem(9, 40, 5)
    both = [x.clone().requires_grad_() for x in (p.hidden, p.weight)]
    fused_linear_opd_loss(*both, p.ids, p.teacher_logprobs, denominator=9).loss.backward()
    hidden = p.hidden.clone().requires_grad_(needs != "weight")
    weight = p.weight.clone().requires_grad_(needs != "hidden")
    fused_linear_opd_loss(hidden, weight, p.ids, p.teacher_logprobs, denominator=9).loss.backward()
    assert (hidden.grad is None) == (needs == "weight")
    assert (weight.grad is None) == (needs == "hidden")
    for got, want in ((hidden.grad, both[0].grad), (weight.grad, both[1].grad)):
        assert got is None or torch.equal(got, want)
    with torch.no_grad():
        out = fused_linear_opd_loss(*both, p.ids, p.teacher_logprobs, denominator=9)
    assert not out.loss.requires_grad


def test_tied_embedding_and_repeated_backward(problem):
    """The head's weight is also the input embedding: its gradient is the sum of both uses."""
    p = problem(12, 20, 6)
    inputs = torch.randint(0, 20, (12,))
    weight = p.weight.clone().requires_grad_()

    def loss(fused):
        hidden = torch.tanh(weight[inputs])
        if fused:
            return fused_linear_opd_loss(
                hidden, weight, p.ids, p.teacher_logprobs, denominator=12
            ).loss
        lp = torch.log_softmax(hidden @ weight.t(), -1).gather(1, p.ids[:, None])[:, 0]
        return -((p.teacher_logprobs.exp() - lp.detach().exp()) * lp).sum() / 12

    (want,) = torch.autograd.grad(loss(False), weight)
    fused = loss(True)
    for scale in (1.0, 2.5, 1.0):
        (fused * scale).backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 4.5 * want)


def test_accumulating_microbatches_is_one_batch(problem):
    p = problem(40, 60, 5)
    weight = p.weight.clone().requires_grad_()

    def loss(rows):
        return fused_linear_opd_loss(
            p.hidden[rows],
            weight,
            p.ids[rows],
            p.teacher_logprobs[rows],
            mask=p.mask[rows],
            denominator=torch.tensor(39),
            alpha=0.5,
        ).loss

    (whole,) = torch.autograd.grad(loss(slice(None)), weight)
    for rows in (slice(0, 7), slice(7, 30), slice(30, 40)):
        loss(rows).backward()
    torch.testing.assert_close(weight.grad, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(problem, dtype):
    p = problem(300, 64, 16, dtype, scale=0.7)
    inputs = [x.requires_grad_() for x in (p.hidden, p.weight)]
    out = fused_linear_opd_loss(
        *inputs, p.ids, p.teacher_logprobs.float(), denominator=300, return_entropy=True
    )
    lp = torch.log_softmax(reference.head_logits(*inputs), -1).gather(1, p.ids[:, None])[:, 0]
    torch.testing.assert_close(out.logprobs.double(), lp, rtol=0, atol=2e-5)
    assert out.logprobs.dtype == out.loss.dtype == out.entropy.dtype == torch.float32
    loss = -((p.teacher_logprobs.double().exp() - lp.detach().exp()) * lp).mean()
    for got, want in zip(torch.autograd.grad(out.loss, inputs), torch.autograd.grad(loss, inputs)):
        assert got.dtype == dtype
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert error < (1e-6 if dtype == torch.float32 else 4e-3)


def test_masked_rows_may_hold_anything(problem):
    p = problem(9, 40, 5)
    junk = ~p.mask
    names = ("advantages", "old_logprobs", "weights")

    def run(poison):
        hidden, lt, ids = p.hidden.clone(), p.teacher_logprobs.clone(), p.ids.clone()
        extra = {name: p.advantages.clone() for name in names}
        if poison:
            hidden[junk], lt[junk], ids[junk] = torch.nan, torch.inf, -100
            for x in extra.values():
                x[junk] = torch.nan
        inputs = [hidden.requires_grad_(), p.weight.clone().requires_grad_()]
        out = fused_linear_opd_loss(
            *inputs, ids, lt, mask=p.mask, denominator=8, entropy_coef=0.1, **extra
        )
        return out, torch.autograd.grad(out.loss, inputs)

    (clean, want), (out, grads) = run(False), run(True)
    assert torch.equal(out.loss, clean.loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, want))
    assert (grads[0][junk] == 0).all()
    assert (out.logprobs[junk] == 0).all() and (out.rewards[junk] == 0).all()


def test_no_rows(problem):
    p = problem(4, 30, 5)
    for rows, mask in ((slice(0, 0), None), (slice(None), torch.zeros(4, dtype=torch.uint8))):
        inputs = [p.hidden[rows].clone().requires_grad_(), p.weight.clone().requires_grad_()]
        out = fused_linear_opd_loss(
            *inputs,
            p.ids[rows],
            p.teacher_logprobs[rows],
            mask=mask,
            denominator=1,
            entropy_coef=0.1,
        )
        assert out.loss == 0
        out.loss.backward()
        assert all((x.grad == 0).all() and x.grad.shape == x.shape for x in inputs)


def test_a_token_that_the_teacher_excludes(problem):
    p = problem(3, 30, 5, torch.float32)
    hidden = p.hidden.requires_grad_()
    lt = torch.tensor([-torch.inf, -1.0, -2.0])
    out = fused_linear_opd_loss(hidden, p.weight, p.ids, lt, alpha=2.0, denominator=3)
    assert out.rewards[0] < 0
    out.loss.backward()
    assert out.loss.isfinite() and hidden.grad.isfinite().all()


def test_autocast_does_not_round(problem):
    p = problem(9, 40, 5, torch.float32)
    inputs = [p.hidden.requires_grad_(), p.weight.requires_grad_()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = fused_linear_opd_loss(*inputs, p.ids, p.teacher_logprobs, denominator=9)
            results.append([out.loss, *torch.autograd.grad(out.loss, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 5.0])
def test_expected_gradient_is_that_of_the_full_vocabulary_loss(problem, alpha):
    """Every token once, weighted by its probability, is the exact expectation over samples."""
    p = problem(1, 13, 5)
    inputs = [p.hidden.requires_grad_(), p.weight.requires_grad_()]
    lq = torch.log_softmax(p.hidden.detach() @ p.weight.detach().t(), -1)[0]
    lt = torch.log_softmax(p.teacher_hidden @ p.teacher_weight.t(), -1)[0]
    sampled = fused_linear_opd_loss(
        p.hidden.expand(13, 5),
        p.weight,
        torch.arange(13),
        lt,
        alpha=alpha,
        weights=lq.exp(),
        denominator=1,
    )
    full = fused_linear_distillation_divergence(
        *inputs, p.teacher_hidden, p.teacher_weight, divergence="power", alpha=alpha, denominator=1
    )
    want = torch.autograd.grad(full.loss, inputs)
    torch.testing.assert_close(
        torch.autograd.grad(sampled.loss, inputs), want, rtol=1e-10, atol=1e-13
    )
