import math

import pytest
import torch

from benchmarks.kernels import reference
from kernels import policy_gradient_loss

OBJECTIVES = {
    "reinforce": {},
    "ppo": {"objective": "ppo_clip", "clip_high": 0.3},
    "dual": {"objective": "ppo_clip", "dual_clip": 1.5},
    "cispo": {"objective": "cispo", "clip_low": 0.5, "clip_high": 0.4},
}


def tokens(T=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    lp = -torch.rand(T, generator=g, dtype=torch.float64) * 4
    old = lp + 0.5 * torch.randn(T, generator=g, dtype=torch.float64)
    rollout = old + 0.3 * torch.randn(T, generator=g, dtype=torch.float64)
    adv = torch.randn(T, generator=g, dtype=torch.float64)
    return lp.requires_grad_(), old, rollout, adv


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("is_cap", [None, 1.1, math.inf])
@pytest.mark.parametrize("on_policy", [True, False])
def test_against_the_textbook(objective, is_cap, on_policy):
    lp, old, rollout, adv = tokens()
    old = None if on_policy else old
    rollout = None if is_cap is None else rollout
    mask = torch.rand(40) < 0.7
    weights = torch.rand(40, dtype=torch.float64)
    options = OBJECTIVES[objective]
    per_token = reference.policy_loss(lp, adv, old, rollout, is_cap=is_cap, **options)
    want = (per_token * weights)[mask].sum() / 13
    out = policy_gradient_loss(
        lp,
        adv,
        old_logprobs=old,
        rollout_logprobs=rollout,
        is_cap=is_cap,
        mask=mask,
        weights=weights,
        denominator=13,
        **options,
    )
    torch.testing.assert_close(out.loss, want)
    (grad,), (exact,) = torch.autograd.grad(3 * out.loss, lp), torch.autograd.grad(3 * want, lp)
    torch.testing.assert_close(grad, exact)
    assert (grad[~mask] == 0).all()


def test_aggregations():
    lp, _, _, adv = tokens(6)
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    seq = torch.tensor([0, 0, 0, 2, 2, 2])  # an id may be missing
    per_token = reference.policy_loss(lp, adv).detach()

    def loss(aggregation, n):
        return policy_gradient_loss(
            lp, adv, mask=mask, seq_ids=seq, aggregation=aggregation, denominator=n
        ).loss

    torch.testing.assert_close(loss("token_mean", 5), per_token[mask].mean())
    torch.testing.assert_close(loss("seq_mean_token_sum", 2), per_token[mask].sum() / 2)
    torch.testing.assert_close(
        loss("seq_mean_token_mean", 2), (per_token[:2].mean() + per_token[3:].mean()) / 2
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradcheck(objective):
    lp, old, _, adv = tokens(5, seed=3)
    options = {"old_logprobs": old, "denominator": 2.0, **OBJECTIVES[objective]}
    if objective == "cispo":
        # Its clipped ratio is a constant, which a numerical derivative does not know.
        options.pop("old_logprobs")
    assert torch.autograd.gradcheck(lambda x: policy_gradient_loss(x, adv, **options).loss, [lp])


def test_stats():
    lp = torch.tensor([-1.0, -1.0, -1.0, -1.0, torch.nan], requires_grad=True)
    old = lp.detach() - torch.tensor([0.0, 1.0, -1.0, 0.1, 0.0])
    adv = torch.tensor([1.0, 1.0, -1.0, 1.0, 0.0])
    mask = torch.tensor([1, 1, 1, 1, 0]).bool()
    out = policy_gradient_loss(
        lp,
        adv,
        old_logprobs=old,
        rollout_logprobs=old - 1,
        is_cap=2.0,
        mask=mask,
        objective="ppo_clip",
        denominator=4,
    )
    d = torch.tensor([0.0, 1.0, -1.0, 0.1])
    want = {
        "ratio_mean": d.exp().mean(),
        "clip_frac_high": 0.25,
        "clip_frac_low": 0.25,
        "is_cap_frac": 1.0,
        "approx_kl": (d.exp() - 1 - d).mean(),
    }
    for name, value in want.items():
        assert out.stats[name].item() == pytest.approx(float(value), rel=1e-5), name
        assert not out.stats[name].requires_grad
    assert out.loss.isfinite()


def test_masked_nan_empty_and_extreme_tokens():
    lp, old, _, adv = tokens(6)
    mask = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    bad = lp.detach().clone()
    bad[~mask] = torch.nan
    bad.requires_grad_()
    clean = policy_gradient_loss(
        lp, adv, old_logprobs=old, mask=mask, denominator=4, objective="ppo_clip"
    ).loss
    junk = torch.where(mask, 0, torch.nan)
    out = policy_gradient_loss(
        bad,
        adv + junk,
        old_logprobs=old + junk,
        weights=junk + 1,
        mask=mask,
        denominator=4,
        objective="ppo_clip",
    )
    assert torch.equal(out.loss, clean)
    out.loss.backward()
    assert (bad.grad[~mask] == 0).all()
    for m in (torch.zeros(6, dtype=torch.bool), None):
        x = lp if m is not None else lp[:0]
        out = policy_gradient_loss(
            x, adv[: len(x)], mask=m, denominator=1.0, old_logprobs=old[: len(x)]
        )
        assert out.loss == 0 and all(s == 0 for s in out.stats.values())
        (grad,) = torch.autograd.grad(out.loss, lp)
        assert (grad == 0).all()
    far = torch.tensor([0.0, -3000.0, -torch.inf], requires_grad=True)
    for adv in ([1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]):
        out = policy_gradient_loss(
            far,
            torch.tensor(adv),
            old_logprobs=torch.tensor([-3000.0, 0.0, -1.0]),
            denominator=1,
            objective="ppo_clip",
        )
        (grad,) = torch.autograd.grad(out.loss, far)
        assert out.loss.isfinite() and grad.isfinite().all()
        assert all(x.isfinite() for x in out.stats.values())
    impossible = torch.tensor([-torch.inf, -1.0])
    assert policy_gradient_loss(impossible, torch.tensor([0.0, 1.0]), denominator=1).loss == 1


def test_tensor_denominator_dtype_and_determinism():
    g = torch.Generator().manual_seed(0)
    lp = -torch.rand(10_000, generator=g)
    adv = torch.randn(10_000, generator=g)
    a = policy_gradient_loss(lp, adv, denominator=torch.tensor(123))
    assert torch.equal(a.loss, policy_gradient_loss(lp, adv, denominator=123.0).loss)
    assert a.loss.dtype == torch.float32
    want = -(adv.double() * lp.double()).sum() / 123
    assert a.loss.item() == pytest.approx(want.item(), rel=1e-6)
    half = lp.bfloat16().requires_grad_()
    policy_gradient_loss(half, adv, denominator=1).loss.backward()
    assert half.grad.dtype == torch.bfloat16
