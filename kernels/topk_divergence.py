"""Divergences on a support of K tokens per position: what a teacher that sends top-k log-probs
allows."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import Shapes, check_choice, check_vocab
from kernels.divergence import Divergence, DivergenceOutput, check_loss
from kernels.logprobs import check_head, fused_linear_logprobs
from kernels.policy_loss import loss_factors, weighted_sum
from kernels.rows import acc_dtype
from kernels.stream import spread

TAILS = ("bucket", "ignore", "renormalize")
# Bytes of gathered head rows [n, K, H] at once.
_GATHER_BYTES = 16 * 2**20


class _SupportLogits(torch.autograd.Function):
    """hidden . weight[id] + bias[id] for K ids per row: K / V of the head's GEMM."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, ids, dtype):
        out = torch.empty(ids.shape, dtype=dtype, device=hidden.device)
        for at, h, w in _gathered(hidden, weight, rows, ids, dtype):
            # out=: not rounded under autocast
            torch.bmm(w, h[:, :, None], out=out[at].unsqueeze(2))
        ctx.save_for_backward(hidden, weight, bias, rows, ids)
        return out if bias is None else out.add_(bias[ids])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, rows, ids = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx = torch.zeros_like(hidden) if needs[0] else None
        dw = torch.zeros(weight.shape, dtype=grad.dtype, device=grad.device) if needs[1] else None
        for at, h, w in _gathered(hidden, weight, rows, ids, grad.dtype):
            if dx is not None:
                dx.index_copy_(0, rows[at], (w * grad[at, :, None]).sum(1).to(dx.dtype))
            if dw is not None:
                dw.index_add_(
                    0, ids[at].flatten(), (grad[at, :, None] * h[:, None, :]).flatten(0, 1)
                )
        db = (
            grad.new_zeros(bias.shape).index_add_(0, ids.flatten(), grad.flatten())
            if needs[2]
            else None
        )
        return (
            dx,
            None if dw is None else dw.to(weight.dtype),
            None if db is None else db.to(bias.dtype),
            None,
            None,
            None,
        )


def _gathered(hidden: Tensor, weight: Tensor, rows: Tensor, ids: Tensor, dtype: torch.dtype):
    """Chunks of (positions, hidden [n, H], head rows of the ids [n, K, H])."""
    size = max(1, _GATHER_BYTES // (4 * max(ids.shape[1] * weight.shape[1], 1)))
    for start in range(0, len(rows), size):
        at = slice(start, start + size)
        yield at, hidden.index_select(0, rows[at]).to(dtype), weight[ids[at]].to(dtype)


class _SupportDivergence(torch.autograd.Function):
    """Per-row divergence [n] of log-masses [n, K], differentiable by both."""

    @staticmethod
    def forward(ctx, ls, lt, divergence: Divergence):
        terms, by_s, by_t = divergence.terms(ls, lt)
        ctx.save_for_backward(by_s, by_t)
        return terms.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        by_s, by_t = ctx.saved_tensors
        return by_s * upstream[:, None], by_t * upstream[:, None], None


def tail_logprob(logprobs: Tensor) -> Tensor:
    """log(1 - sum of the K probabilities), [n]; never below log eps, since the sum is only known to
    that."""
    return torch.log1p(-logprobs.exp().sum(1).clamp_max(1 - torch.finfo(logprobs.dtype).eps))


def given_log_masses(logprobs: Tensor, tail: str, given_tail: Tensor | None = None) -> Tensor:
    """Log-masses [n, K] or, with a bucket, [n, K + 1], from log-probs [n, K]."""
    if tail == "renormalize":
        return logprobs - logprobs.logsumexp(1, keepdim=True)
    if tail == "ignore":
        return logprobs
    rest = tail_logprob(logprobs) if given_tail is None else given_tail
    return torch.cat([logprobs, rest[:, None]], 1)


def model_log_masses(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    tail: str,
    dtype: torch.dtype,
    rows: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    valid_vocab_size: int,
    mask: Tensor | None,
) -> Tensor:
    """Those of a model at the support ids [n, K] of the active rows, differentiable."""
    if tail == "renormalize":  # the full softmax cancels, so K logits per row are enough
        z = _SupportLogits.apply(hidden, weight, bias, rows, ids, dtype)
        if logit_softcap is not None:
            z = logit_softcap * torch.tanh(z / logit_softcap)
        return given_log_masses(z / temperature, tail)
    logprobs = fused_linear_logprobs(
        hidden,
        weight,
        spread(ids, rows, len(hidden)),
        bias=bias,
        temperature=temperature,
        logit_softcap=logit_softcap,
        valid_vocab_size=valid_vocab_size,
        mask=mask,
    ).logprobs
    return given_log_masses(logprobs.index_select(0, rows).to(dtype), tail)


def support_divergence(
    ls: Tensor, lt: Tensor, divergence: Divergence, factors: Tensor, rows: Tensor, T: int
) -> DivergenceOutput:
    values = _SupportDivergence.apply(ls, lt, divergence)
    return DivergenceOutput(
        weighted_sum(values, factors), spread(values.detach(), rows, T), None, None
    )


def topk_distillation_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    support_ids: Tensor,
    teacher_logprobs: Tensor,
    *,
    denominator: float | Tensor,
    divergence: str = "reverse_kl",
    alpha: float = 1.0,
    normalization: str = "box_cox",
    beta: float = 0.5,
    tail: str = "bucket",
    teacher_tail_logprob: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    valid_vocab_size: int | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> DivergenceOutput:
    """Divergence of the student from a teacher that is known on K tokens per position.

    tail="bucket": all other tokens are one more outcome; the teacher's log-mass of it is
    teacher_tail_logprob [T], by default log(1 - sum of the K). For the KLs and the JSD it is a
    lower bound of the full divergence. tail="renormalize": both distributions are renormalised on
    the support; only K logits per row are made, no full LM-head GEMM. tail="ignore": the support's
    terms alone, each >= 0 (for a KL: a log(a/b) - a + b), so that matching the teacher on the
    support is optimal and the mass outside is free.

    student_hidden [T, H], student_weight [V, H], bias [V]: floating, differentiable; support_ids
    [T, K] int64, distinct within a row; teacher_logprobs [T, K] floating, nats, constant, at the
    same temperature. For the divergences, the other arguments and the errors see
    `distillation_divergence`. Returns DivergenceOutput(loss, divergence [T], None, None). No [T, V]
    tensor is made."""
    shapes = Shapes()
    check_head(
        shapes,
        student_hidden,
        student_weight,
        bias,
        temperature,
        logit_softcap,
        mask,
        names=("student_hidden", "student_weight", "bias", "logit_softcap"),
    )
    shapes.check("teacher_logprobs", teacher_logprobs, "TK")
    shapes.check("teacher_tail_logprob", teacher_tail_logprob, "T", optional=True)
    check_choice("tail", tail, TAILS)
    if teacher_tail_logprob is not None and tail != "bucket":
        raise ValueError(f"teacher_tail_logprob belongs to tail='bucket', got tail={tail!r}")
    rule = Divergence(divergence, alpha, normalization, beta)
    vocab = check_vocab(valid_vocab_size, student_weight.shape[0])
    rows = check_loss(shapes, len(student_hidden), mask, weights, None, vocab, denominator)
    shapes.ids("support_ids", support_ids, "TK", rows, vocab)

    dtype = acc_dtype(student_hidden, student_weight, teacher_logprobs)
    ids = support_ids.index_select(0, rows)
    ls = model_log_masses(
        student_hidden,
        student_weight,
        ids,
        tail,
        dtype,
        rows,
        bias=bias,
        mask=mask,
        temperature=temperature,
        logit_softcap=logit_softcap,
        valid_vocab_size=vocab,
    )
    with torch.no_grad():
        rest = (
            None
            if teacher_tail_logprob is None
            else teacher_tail_logprob.index_select(0, rows).to(dtype)
        )
        lt = given_log_masses(teacher_logprobs.index_select(0, rows).to(dtype), tail, rest)
    factors = loss_factors(rows, weights, denominator, dtype)
    return support_divergence(ls, lt, rule, factors, rows, len(student_hidden))
