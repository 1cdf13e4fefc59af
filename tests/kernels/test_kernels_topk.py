import pytest
import torch

from benchmarks.kernels import reference
from kernels import (
    fused_linear_distillation_divergence,
    fused_linear_self_distillation_kl,
    fused_linear_topk_logprobs,
    topk_distillation_divergence,
)

DIVERGENCES = {
    "reverse_kl": {},
    "forward_kl": {},
    "jsd": {"beta": 0.3},
    "power": {"alpha": 2.0},
}


@pytest.mark.parametrize("tail", ["bucket", "ignore", "renormalize"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_against_oracle(problem, head, divergence, tail, monkeypatch):
    # several chunks of gathered head rows
    monkeypatch.setattr("kernels.topk_divergence._GATHER_BYTES", 4000)
    p = problem(70, 2100, 4)
    options, naive = head(p)
    inputs = [
        x.requires_grad_()
        for x in (p.hidden, p.weight, p.bias)
        if x is not p.bias or "bias" in options
    ]
    top = fused_linear_topk_logprobs(
        p.teacher_hidden,
        p.teacher_weight,
        9,
        temperature=naive["temperature"],
        valid_vocab_size=naive["vocab"],
    )
    kind = {"divergence": divergence, **DIVERGENCES[divergence]}
    out = topk_distillation_divergence(
        p.hidden,
        p.weight,
        top.ids,
        top.logprobs,
        tail=tail,
        mask=p.mask,
        weights=p.weights,
        denominator=14.0,
        **kind,
        **options,
    )
    ls = torch.log_softmax(reference.head_logits(p.hidden, p.weight, **naive), -1)
    lt = torch.log_softmax(
        reference.head_logits(
            p.teacher_hidden,
            p.teacher_weight,
            temperature=naive["temperature"],
            vocab=naive["vocab"],
        ),
        -1,
    )
    d = reference.divergence(
        reference.support_log_masses(ls, top.ids, tail),
        reference.support_log_masses(lt, top.ids, tail),
        **kind,
    )
    loss = (d * p.weights * p.mask).sum() * 0.5 / 7
    torch.testing.assert_close(out.divergence, (d * p.mask).detach())
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(
        torch.autograd.grad(2 * out.loss, inputs),
        torch.autograd.grad(2 * loss, inputs),
        rtol=1e-7,
        atol=1e-10,
    )


@pytest.mark.parametrize("tail", ["bucket", "ignore", "renormalize"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(problem, divergence, tail):
    p = problem(3, 11, 5)
    top = fused_linear_topk_logprobs(p.teacher_hidden, p.teacher_weight, 4)
    given = torch.log(top.tail_mass * 0.5) if tail == "bucket" else None

    def loss(hidden, weight, bias):
        return topk_distillation_divergence(
            hidden,
            weight,
            top.ids,
            top.logprobs,
            divergence=divergence,
            tail=tail,
            teacher_tail_logprob=given,
            bias=bias,
            logit_softcap=4.0,
            mask=p.mask,
            denominator=2.0,
            **DIVERGENCES[divergence],
        ).loss

    inputs = [x.requires_grad_() for x in (p.hidden, p.weight, p.bias)]
    assert torch.autograd.gradcheck(loss, inputs)


def test_the_tail_by_default_is_what_the_support_leaves(problem):
    p = problem(3, 11, 5)
    top = fused_linear_topk_logprobs(p.teacher_hidden, p.teacher_weight, 4)
    given, default = (
        topk_distillation_divergence(
            p.hidden, p.weight, top.ids, top.logprobs, teacher_tail_logprob=tail, denominator=1
        ).divergence
        for tail in (top.tail_mass.log(), None)
    )
    torch.testing.assert_close(given, default)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_all_tokens_as_support_is_the_full_divergence(problem, divergence):
    p = problem(6, 40, 5)
    options = {"divergence": divergence, "denominator": 1.0}
    full = fused_linear_distillation_divergence(
        p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, **options
    )
    for k in (40, 5):
        top = fused_linear_topk_logprobs(p.teacher_hidden, p.teacher_weight, k)
        for tail in ("bucket", "ignore", "renormalize"):
            d = topk_distillation_divergence(
                p.hidden, p.weight, top.ids, top.logprobs, tail=tail, **options
            ).divergence
            if k == 40:
                torch.testing.assert_close(d, full.divergence)
            elif tail == "bucket":
                assert (d <= full.divergence + 1e-12).all()
            assert (d >= 0).all()


@pytest.mark.parametrize("tail", ["bucket", "ignore", "renormalize"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_models_are_at_zero(problem, tail, dtype):
    p = problem(20, 300, 6, dtype)
    weight = p.weight.requires_grad_()
    for k in (300, 10):
        top = fused_linear_topk_logprobs(p.hidden, weight, k)
        out = topk_distillation_divergence(
            p.hidden, weight, top.ids, top.logprobs, tail=tail, denominator=20.0
        )
        assert (out.divergence >= 0).all() and out.divergence.max() < 1e-9
        assert torch.autograd.grad(out.loss, weight)[0].abs().max() < 1e-4


def test_masked_and_empty(problem):
    p = problem(8, 40, 6)
    top = fused_linear_topk_logprobs(p.teacher_hidden, p.teacher_weight, 5)
    junk = ~p.mask
    for tail in ("bucket", "ignore", "renormalize"):
        clean = topk_distillation_divergence(
            p.hidden, p.weight, top.ids, top.logprobs, tail=tail, mask=p.mask, denominator=1
        )
        hidden, ids, lt = p.hidden.clone(), top.ids.clone(), top.logprobs.clone()
        hidden[junk], ids[junk], lt[junk] = torch.nan, -1, torch.nan
        inputs = [hidden.requires_grad_(), p.weight.clone().requires_grad_()]
        out = topk_distillation_divergence(*inputs, ids, lt, tail=tail, mask=p.mask, denominator=1)
        assert torch.equal(out.loss, clean.loss) and torch.equal(out.divergence, clean.divergence)
        grads = torch.autograd.grad(out.loss, inputs)
        assert all(g.isfinite().all() for g in grads) and (grads[0][junk] == 0).all()
        for rows, mask in ((slice(0, 0), None), (slice(None), torch.zeros(8, dtype=torch.bool))):
            inputs = [p.hidden[rows].clone().requires_grad_(), p.weight.clone().requires_grad_()]
            out = topk_distillation_divergence(
                *inputs, top.ids[rows], top.logprobs[rows], tail=tail, mask=mask, denominator=1
            )
            assert out.loss == 0
            assert all((g == 0).all() for g in torch.autograd.grad(out.loss, inputs))


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("stop_grad", ["teacher", "none"])
def test_self_distillation_on_the_teacher_views_top(problem, tail, stop_grad):
    p = problem(70, 2100, 4)
    teacher = p.rand(70, 4)
    inputs = [x.requires_grad_() for x in (p.hidden, teacher, p.weight, p.bias)]
    out = fused_linear_self_distillation_kl(
        p.hidden,
        teacher,
        p.weight,
        bias=p.bias,
        top_k=7,
        tail=tail,
        stop_grad=stop_grad,
        mask=p.mask,
        temperature=1.3,
        denominator=3.0,
    )
    ls, lt = (
        torch.log_softmax(reference.head_logits(x, p.weight, p.bias, temperature=1.3), -1)
        for x in (p.hidden, teacher)
    )
    lt = lt if stop_grad == "none" else lt.detach()
    ids = lt.detach().topk(7, dim=1).indices
    loss = (
        reference.divergence(
            reference.support_log_masses(ls, ids, tail),
            reference.support_log_masses(lt, ids, tail),
            divergence="forward_kl",
        )
        * p.mask
    ).sum() / 3
    torch.testing.assert_close(out.loss, loss)
    got = torch.autograd.grad(out.loss, inputs, allow_unused=True)
    want = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert (got[1] is None) == (stop_grad == "teacher")
    torch.testing.assert_close(
        [g for g in got if g is not None], [w for w in want if w is not None]
    )


def test_autocast_does_not_round(problem):
    p = problem(9, 40, 5, torch.float32)
    top = fused_linear_topk_logprobs(p.teacher_hidden, p.teacher_weight, 5)
    inputs = [p.hidden.requires_grad_(), p.weight.requires_grad_()]
    for tail in ("bucket", "renormalize"):
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = topk_distillation_divergence(
                    *inputs, top.ids, top.logprobs, tail=tail, denominator=9
                )
                results.append([out.loss, *torch.autograd.grad(out.loss, inputs)])
        assert all(torch.equal(a, b) for a, b in zip(*results))
