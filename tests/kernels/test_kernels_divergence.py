import math

import pytest
import torch

from benchmarks.kernels import reference
from kernels import (
    distillation_divergence,
    fused_linear_distillation_divergence,
    fused_linear_logprobs,
    fused_linear_self_distillation_kl,
)
from kernels.divergence import bregman_terms

DIVERGENCES = {
    "reverse_kl": {},
    "forward_kl": {},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "jsd0": {"divergence": "jsd", "beta": 0.0},
    "jsd1": {"divergence": "jsd", "beta": 1.0},
    "power_0": {"divergence": "power", "alpha": 0.0},
    "power_1e-6": {"divergence": "power", "alpha": 1e-6},
    "power_1": {"divergence": "power", "alpha": 1.0},
    "power_5": {"divergence": "power", "alpha": 5.0, "normalization": "none"},
}


@pytest.fixture(params=DIVERGENCES)
def divergence(request):
    return {"divergence": request.param, **DIVERGENCES[request.param]}


def tolerance(divergence):
    """The reference of a tiny alpha is its limit, alpha away."""
    near = divergence.get("alpha", 1) == 1e-6
    return {"rtol": 1e-4, "atol": 1e-4} if near else {"rtol": 1e-8, "atol": 1e-11}


def test_logits_against_oracle(problem, divergence):
    p = problem(30, 300, 4)
    zs = reference.head_logits(p.hidden, p.weight).requires_grad_()
    zt = reference.head_logits(p.teacher_hidden, p.teacher_weight)[:, :290]
    out = distillation_divergence(
        zs,
        zt,
        mask=p.mask,
        weights=p.weights,
        denominator=14.0,
        temperature=1.4,
        valid_vocab_size=280,
        token_ids=p.ids.clamp(max=279),
        return_entropy=True,
        **divergence,
    )
    ls, lt = (torch.log_softmax(z[:, :280] / 1.4, -1) for z in (zs, zt))
    d = reference.divergence(ls, lt, **divergence)
    loss = (d * p.weights * p.mask).sum() * 0.5 / 7
    torch.testing.assert_close(out.divergence, (d * p.mask).detach(), **tolerance(divergence))
    torch.testing.assert_close(out.loss, loss, **tolerance(divergence))
    torch.testing.assert_close(
        out.logprobs, (ls.gather(1, p.ids.clamp(max=279)[:, None])[:, 0] * p.mask).detach()
    )
    torch.testing.assert_close(out.entropy, (-(ls.exp() * ls).sum(1) * p.mask).detach())
    got, want = torch.autograd.grad(2 * out.loss, zs), torch.autograd.grad(2 * loss, zs)
    torch.testing.assert_close(got, want, **tolerance(divergence))
    assert (got[0][:, 280:] == 0).all() and (got[0][~p.mask] == 0).all()


def test_linear_against_oracle(problem, divergence):
    """Tiles, row blocks and chunks; H, V and dtype differ between the models; every head option."""
    p = problem(200, 2100, 4)
    inputs = [x.requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    teacher_weight, valid = torch.cat([p.teacher_weight, p.teacher_weight]).float(), 2090
    ids = p.ids.clamp(max=valid - 1)
    out = fused_linear_distillation_divergence(
        p.hidden,
        p.weight,
        p.teacher_hidden,
        teacher_weight,
        student_bias=p.bias,
        teacher_bias=torch.cat([p.bias, p.bias]),
        student_logit_softcap=4.0,
        teacher_logit_softcap=3.0,
        temperature=1.4,
        valid_vocab_size=valid,
        mask=p.mask,
        weights=p.weights,
        denominator=7.0,
        loss_scale=0.5,
        token_ids=ids,
        return_entropy=True,
        **divergence,
    )
    ls = torch.log_softmax(
        reference.head_logits(*inputs, softcap=4.0, temperature=1.4, vocab=valid), -1
    )
    lt = torch.log_softmax(
        reference.head_logits(
            p.teacher_hidden,
            teacher_weight[:2100],
            p.bias,
            softcap=3.0,
            temperature=1.4,
            vocab=valid,
        ),
        -1,
    ).detach()
    d = reference.divergence(ls, lt, **divergence)
    loss = (d * p.weights * p.mask).sum() * 0.5 / 7
    torch.testing.assert_close(out.divergence, (d * p.mask).detach(), **tolerance(divergence))
    torch.testing.assert_close(out.logprobs, (ls.gather(1, ids[:, None])[:, 0] * p.mask).detach())
    torch.testing.assert_close(out.entropy, (-(ls.exp() * ls).sum(1) * p.mask).detach())
    got, want = torch.autograd.grad(2 * out.loss, inputs), torch.autograd.grad(2 * loss, inputs)
    torch.testing.assert_close(got, want, **tolerance(divergence))


@pytest.mark.parametrize(("H", "teacher_H"), [(3, 1200), (1200, 3)])
def test_models_of_very_different_width_share_their_tiles(problem, H, teacher_H):
    p = problem(5, 2100, H, scale=0.1)
    hidden, weight = p.hidden.requires_grad_(), p.weight.requires_grad_()
    teacher, teacher_weight = p.rand(5, teacher_H), p.rand(2100, teacher_H)
    out = fused_linear_distillation_divergence(
        hidden, weight, teacher, teacher_weight, denominator=1
    )
    ls, lt = (
        torch.log_softmax(reference.head_logits(*x), -1)
        for x in ((hidden, weight), (teacher, teacher_weight))
    )
    loss = reference.divergence(ls, lt, divergence="reverse_kl").sum()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, [hidden, weight]), torch.autograd.grad(loss, [hidden, weight])
    )


def test_gradcheck(problem, divergence):
    p = problem(3, 11, 5)
    inputs = [x.requires_grad_() for x in (p.hidden, p.weight)]
    assert torch.autograd.gradcheck(
        lambda h, w: (
            fused_linear_distillation_divergence(
                h, w, p.teacher_hidden, p.teacher_weight, mask=p.mask, denominator=2.0, **divergence
            ).loss
        ),
        inputs,
    )
    assert torch.autograd.gradcheck(
        lambda z: (
            distillation_divergence(
                z, p.rand(3, 11) * 0, mask=p.mask, denominator=2.0, **divergence
            ).loss
        ),
        [p.rand(3, 11).requires_grad_()],
    )


@pytest.mark.parametrize("alpha", [0.01, 0.5, 1.0, 3.0, 20.0])
def test_power_is_what_the_sampled_reward_optimises(alpha):
    """E_{y~q}[(p^a - q^a) grad log q(y)] = -a grad B, by enumeration of the vocabulary in
    float64."""
    g = torch.Generator().manual_seed(0)
    z, zt = (
        torch.randn(8, 12, generator=g, dtype=torch.float64) * 2,
        torch.randn(8, 12, generator=g, dtype=torch.float64),
    )
    z.requires_grad_()
    ls, p = torch.log_softmax(z, -1), torch.softmax(zt, -1)
    q = ls.detach().exp()
    (expected,) = torch.autograd.grad((q * (p**alpha - q**alpha) * ls).sum(), z)
    for normalization, factor in (("none", 1.0), ("box_cox", alpha)):
        loss = distillation_divergence(
            z, zt, divergence="power", alpha=alpha, normalization=normalization, denominator=1.0
        ).loss
        (grad,) = torch.autograd.grad(loss * factor, z)
        assert (grad + expected).abs().max() < 1e-6 * expected.abs().max()
    if alpha == 1:
        torch.testing.assert_close(loss, 0.5 * (p - q).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_for_identical_and_never_negative(problem, divergence, dtype):
    p = problem(20, 2500, 6, dtype)
    zs = (p.hidden @ p.weight.t()).requires_grad_()
    out = distillation_divergence(zs, zs.detach().clone(), denominator=1.0, **divergence)
    assert (out.divergence == 0).all() and out.loss == 0
    assert (torch.autograd.grad(out.loss, zs)[0] == 0).all()
    weight = p.weight.requires_grad_()
    out = fused_linear_distillation_divergence(
        p.hidden, weight, p.hidden, weight, denominator=1.0, **divergence
    )
    assert out.loss == 0
    assert (torch.autograd.grad(out.loss, weight)[0] == 0).all()
    for eps in (1e-7, 1e-6, 1e-5, 1e-3, 0.1, 10.0):
        d = distillation_divergence(
            zs, zs + eps * p.rand(20, 2500), denominator=1.0, **divergence
        ).divergence
        assert (d >= 0).all() and d.isfinite().all()


@pytest.mark.parametrize("alpha", [0, 0.01, 1.0, 5.0, 50.0])
def test_every_term_is_at_least_zero(alpha):
    """Also where the term is smaller than its rounding error."""
    g = torch.Generator().manual_seed(0)
    gap = torch.randn(100_000, generator=g) * 10 ** (-9 * torch.rand(100_000, generator=g))
    for lq in (torch.zeros(100_000), torch.full((100_000,), -0.3)):
        terms, _, _ = bregman_terms(lq, (lq + gap).clamp_max(0), alpha)
        assert (terms >= 0).all()


@pytest.mark.parametrize(("eps", "error"), [(1.0, 1e-5), (0.1, 2e-5), (1e-2, 1e-4), (1e-3, 2e-3)])
def test_small_divergences_keep_their_digits_in_float32(divergence, eps, error):
    """Divergences from 1e-1 down to 1e-7 nats against float64 on the same float32 logits.

    A power alpha leaves few terms, so the rounding of their log-probs does not average out.
    """
    if divergence["divergence"] == "power":
        error *= 1 + 10 * divergence["alpha"]
    g = torch.Generator().manual_seed(0)
    zs = torch.randn(16, 5000, generator=g) * 3
    zt = zs + eps * torch.randn(16, 5000, generator=g)
    options = {**divergence, "denominator": 1.0}
    exact = distillation_divergence(zs.double(), zt.double(), **options).divergence
    got = distillation_divergence(zs, zt, **options).divergence
    assert ((got.double() - exact).abs() <= error * exact).all()


def test_excluded_tokens(divergence):
    """-inf in both models contributes nothing; in one of them, what the divergence says."""
    inf = torch.inf
    zs = torch.tensor([[0.0, 1.0, -inf, 0.5], [0.0, 1.0, -inf, 0.5], [0.0, -1.0, 2.0, 0.5]])
    zt = torch.tensor([[1.0, 0.0, -inf, 0.2], [1.0, 0.0, 0.3, 0.2], [0.1, 0.2, -inf, 0.7]])
    zs.requires_grad_()
    out = distillation_divergence(zs, zt, denominator=1.0, **divergence)
    # row 1: the student excludes; row 2: the teacher excludes
    name, alpha = divergence["divergence"], divergence.get("alpha", 1.0)
    beta = divergence.get("beta", 0.5)
    reverse = (
        name == "reverse_kl" or (name == "jsd" and beta == 1) or (name == "power" and alpha == 0)
    )
    forward = name == "forward_kl" or (name == "jsd" and beta == 0)
    assert out.divergence.isfinite().tolist() == [True, not forward, not reverse]
    assert not out.divergence.isnan().any()
    both = distillation_divergence(
        zs[:1, [0, 1, 3]], zt[:1, [0, 1, 3]], denominator=1.0, **divergence
    )
    torch.testing.assert_close(out.divergence[:1], both.divergence)
    for row, fine in enumerate(out.divergence.isfinite().tolist()):
        if fine:
            loss = distillation_divergence(
                zs, zt, mask=torch.arange(3) == row, denominator=1.0, **divergence
            ).loss
            (grad,) = torch.autograd.grad(loss, zs)
            assert grad.isfinite().all()
            assert (grad[zs == -inf] == 0).all() or row == 1


def test_far_apart_peaks(divergence):
    """One-hot against another one-hot, hundreds of nats apart, in float32."""
    zs, zt = torch.tensor([[300.0, 0.0, -50.0]]), torch.tensor([[0.0, 300.0, -50.0]])
    zs.requires_grad_()
    out = distillation_divergence(zs, zt, denominator=1.0, **divergence)
    exact = distillation_divergence(zs.double(), zt.double(), denominator=1.0, **divergence)
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=1e-5, atol=0)
    if divergence["divergence"] in ("reverse_kl", "forward_kl"):
        torch.testing.assert_close(out.loss, torch.tensor(300.0))
    assert torch.autograd.grad(out.loss, zs)[0].isfinite().all()


def test_masked_rows_may_hold_anything(problem, divergence):
    p = problem(8, 40, 6)
    junk = ~p.mask

    def run(poison):
        hidden, teacher, weights, ids = (
            x.clone() for x in (p.hidden, p.teacher_hidden, p.weights, p.ids)
        )
        if poison:
            hidden[junk], teacher[junk], weights[junk], ids[junk] = (
                torch.nan,
                torch.inf,
                torch.nan,
                9999,
            )
        inputs = [hidden.requires_grad_(), p.weight.clone().requires_grad_()]
        out = fused_linear_distillation_divergence(
            *inputs,
            teacher,
            p.teacher_weight,
            mask=p.mask,
            weights=weights,
            token_ids=ids,
            denominator=3.0,
            **divergence,
        )
        logits = (
            p.rand(8, 40) * 0 + 1
            if not poison
            else torch.where(junk[:, None], torch.nan, torch.ones(8, 40)).double()
        )
        plain = distillation_divergence(
            logits.requires_grad_(),
            p.teacher_logprobs[:, None] * torch.arange(40),
            mask=p.mask,
            denominator=3.0,
            **divergence,
        )
        return [
            out.loss,
            out.divergence,
            out.logprobs,
            plain.loss,
            *torch.autograd.grad(out.loss, inputs),
            torch.autograd.grad(plain.loss, logits)[0],
        ]

    clean, got = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(got, clean))
    assert (got[1][junk] == 0).all() and (got[4][junk] == 0).all() and (got[6][junk] == 0).all()


def test_no_rows(problem):
    p = problem(4, 30, 5)
    for rows, mask in ((slice(0, 0), None), (slice(None), torch.zeros(4, dtype=torch.bool))):
        inputs = [p.hidden[rows].clone().requires_grad_(), p.weight.clone().requires_grad_()]
        out = fused_linear_distillation_divergence(
            *inputs, p.teacher_hidden[rows], p.teacher_weight, mask=mask, denominator=1
        )
        assert out.loss == 0
        out.loss.backward()
        assert all((x.grad == 0).all() and x.grad.shape == x.shape for x in inputs)
        logits = p.rand(4, 30)[rows].clone().requires_grad_()
        distillation_divergence(logits, logits.detach(), mask=mask, denominator=1).loss.backward()
        assert (logits.grad == 0).all()


def test_the_teacher_gets_no_gradient_and_a_frozen_head_none(problem):
    p = problem(6, 30, 5)
    hidden, teacher = p.hidden.requires_grad_(), p.teacher_hidden.requires_grad_()
    teacher_weight = p.teacher_weight.requires_grad_()
    fused_linear_distillation_divergence(
        hidden, p.weight, teacher, teacher_weight, denominator=1
    ).loss.backward()
    assert hidden.grad.abs().sum() > 0
    assert p.weight.grad is None and teacher.grad is None and teacher_weight.grad is None
    logits, teacher_logits = p.rand(6, 30).requires_grad_(), p.rand(6, 30).requires_grad_()
    distillation_divergence(logits, teacher_logits, denominator=1).loss.backward()
    assert teacher_logits.grad is None
    with torch.no_grad():
        out = fused_linear_distillation_divergence(
            hidden, p.weight, teacher, teacher_weight, denominator=1
        )
    assert not out.loss.requires_grad


def test_inplace_backward(problem):
    p = problem(6, 30, 5, torch.float32)
    z, zt = p.rand(6, 30), p.rand(6, 30)
    grads = []
    for inplace in (False, True):
        leaf = z.clone().requires_grad_()
        logits = leaf * 1.0
        distillation_divergence(
            logits, zt, mask=p.mask, valid_vocab_size=28, denominator=2.0, inplace_backward=inplace
        ).loss.backward()
        grads.append(leaf.grad)
        assert torch.equal(logits.detach(), grads[-1] if inplace else z)
    assert torch.equal(*grads)


def test_low_precision_and_autocast(problem):
    p = problem(70, 300, 16, torch.bfloat16, scale=0.7)
    inputs = [x.requires_grad_() for x in (p.hidden, p.weight)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = fused_linear_distillation_divergence(
                *inputs, p.teacher_hidden, p.teacher_weight, denominator=70, token_ids=p.ids
            )
            results.append([out.divergence, *torch.autograd.grad(out.loss, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    exact = fused_linear_distillation_divergence(
        p.hidden.double(),
        p.weight.double(),
        p.teacher_hidden.double(),
        p.teacher_weight.double(),
        denominator=70,
    )
    torch.testing.assert_close(out.divergence.double(), exact.divergence, rtol=1e-5, atol=1e-6)
    want = torch.autograd.grad(exact.loss, inputs)
    for got, w in zip(results[0][1:], want):
        assert got.dtype == torch.bfloat16
        assert (got.double() - w.double()).norm() < 4e-3 * w.double().norm()
    score = fused_linear_logprobs(p.hidden, p.weight, p.ids)
    assert torch.equal(out.logprobs, score.logprobs)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_self_distillation_is_the_two_model_divergence_with_one_head(problem, kind):
    p = problem(20, 2100, 5)
    teacher = p.rand(20, 5)
    inputs = [x.requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    options = {
        "divergence": kind,
        "beta": 0.3,
        "mask": p.mask,
        "weights": p.weights,
        "denominator": 3.0,
        "temperature": 1.2,
    }
    one = fused_linear_self_distillation_kl(
        p.hidden, teacher.requires_grad_(), p.weight, bias=p.bias, logit_softcap=4.0, **options
    )
    two = fused_linear_distillation_divergence(
        p.hidden,
        p.weight,
        teacher,
        p.weight.detach(),
        student_bias=p.bias,
        teacher_bias=p.bias.detach(),
        student_logit_softcap=4.0,
        teacher_logit_softcap=4.0,
        **options,
    )
    assert torch.equal(one.divergence, two.divergence)
    grads = torch.autograd.grad(one.loss, [*inputs, teacher], allow_unused=True)
    assert grads[3] is None or (grads[3] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(two.loss, inputs)))


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_self_distillation_of_both_views(problem, kind):
    p = problem(140, 2100, 4)
    teacher = p.rand(140, 4)
    inputs = [x.requires_grad_() for x in (p.hidden, teacher, p.weight, p.bias)]
    out = fused_linear_self_distillation_kl(
        p.hidden,
        teacher,
        p.weight,
        bias=p.bias,
        divergence=kind,
        stop_grad="none",
        mask=p.mask,
        denominator=3.0,
    )
    ls, lt = (
        torch.log_softmax(reference.head_logits(x, p.weight, p.bias), -1)
        for x in (p.hidden, teacher)
    )
    loss = (reference.divergence(ls, lt, divergence=kind) * p.mask).sum() / 3
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(
        torch.autograd.grad(out.loss, inputs), torch.autograd.grad(loss, inputs)
    )


def test_loss_scale_and_denominator_may_be_tensors(problem):
    p = problem(6, 30, 5)
    scaled = fused_linear_distillation_divergence(
        p.hidden,
        p.weight,
        p.teacher_hidden,
        p.teacher_weight,
        denominator=torch.tensor(4),
        loss_scale=torch.tensor(8.0),
    )
    assert scaled.loss.item() == pytest.approx(2 * scaled.divergence.sum().item())
    assert math.isfinite(scaled.loss)
