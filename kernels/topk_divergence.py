"""Divergences on a support of K tokens per position: what a teacher that sends top-k log-probs
allows."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import Shapes, check_choice, check_vocab
from kernels.divergence import Divergence, DivergenceOutput, check_loss, divergence_fields
from kernels.library import traceable
from kernels.logprobs import fused_linear_logprobs
from kernels.policy_loss import loss_factors, weighted_sum
from kernels.rows import acc_dtype, slices
from kernels.tiled_head import HeadInputs, spread

TAILS = ("bucket", "ignore", "renormalize")
# Bytes of gathered head rows [n, K, H] at once.
_GATHER_BYTES = 16 * 2**20


class _SupportLogits(torch.autograd.Function):
    """hidden . weight[id] + bias[id] for K ids per active token: K / V of the head's GEMM."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, active, ids, dtype):
        out = torch.empty(ids.shape, dtype=dtype, device=hidden.device)
        for at, h, w in _gathered(hidden, weight, active, ids, dtype):
            # out= keeps autocast from rounding.
            torch.bmm(w, h[:, :, None], out=out[at].unsqueeze(2))
        ctx.save_for_backward(hidden, weight, bias, active, ids)
        return out if bias is None else out.add_(bias[ids])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, active, ids = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        dx = dw = db = None
        if needs_hidden:
            dx = torch.zeros_like(hidden)
        if needs_weight:
            dw = torch.zeros(weight.shape, dtype=grad.dtype, device=grad.device)
        for at, h, w in _gathered(hidden, weight, active, ids, grad.dtype):
            g = grad[at, :, None]
            if dx is not None:
                dx.index_copy_(0, active[at], (w * g).sum(1).to(dx.dtype))
            if dw is not None:
                dw.index_add_(0, ids[at].flatten(), (g * h[:, None, :]).flatten(0, 1))
        dw = None if dw is None else dw.to(weight.dtype)
        if needs_bias:
            db = grad.new_zeros(bias.shape).index_add_(0, ids.flatten(), grad.flatten())
            db = db.to(bias.dtype)
        return dx, dw, db, None, None, None


def _gathered(
    hidden: Tensor, weight: Tensor, active: Tensor, ids: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of (slice of the active tokens, hidden [n, H], head rows of the ids [n, K, H])."""
    size = max(1, _GATHER_BYTES // (4 * max(ids.shape[1] * weight.shape[1], 1)))
    for at in slices(len(active), size):
        yield at, hidden.index_select(0, active[at]).to(dtype), weight[ids[at]].to(dtype)


class _SupportDivergence(torch.autograd.Function):
    """Per-row divergence [n] of log-masses [n, K], differentiable by both."""

    @staticmethod
    def forward(ctx, log_s, log_t, divergence: Divergence):
        terms, by_s, by_t = divergence.terms(log_s, log_t)
        ctx.save_for_backward(by_s, by_t)
        return terms.sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        by_s, by_t = ctx.saved_tensors
        return by_s * upstream[:, None], by_t * upstream[:, None], None


def tail_logprob(logprobs: Tensor) -> Tensor:
    """log(1 - sum of the K probabilities), [n].

    It is never below log eps, since the sum is only known to that.
    """
    eps = torch.finfo(logprobs.dtype).eps
    return torch.log1p(-logprobs.exp().sum(1).clamp_max(1 - eps))


def given_log_masses(logprobs: Tensor, tail: str, given_tail: Tensor | None = None) -> Tensor:
    """Log-masses [n, K] or, with a bucket, [n, K + 1], from log-probs [n, K]."""
    if tail == "renormalize":
        return logprobs - logprobs.logsumexp(1, keepdim=True)
    if tail == "ignore":
        return logprobs
    rest = tail_logprob(logprobs) if given_tail is None else given_tail
    return torch.cat([logprobs, rest[:, None]], 1)


def model_log_masses(
    model: HeadInputs,
    ids: Tensor,
    tail: str,
    vocab: int,
    dtype: torch.dtype,
    active: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Those of a model at the support ids [n, K] of the active tokens, differentiable."""
    hidden, weight, bias, temperature, softcap = model
    if tail == "renormalize":
        # The full softmax cancels, so K logits per token are enough.
        z = _SupportLogits.apply(hidden, weight, bias, active, ids, dtype)
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        return given_log_masses(z / temperature, tail)
    logprobs = fused_linear_logprobs(
        hidden,
        weight,
        spread(ids, active, len(hidden)),
        bias=bias,
        temperature=temperature,
        logit_softcap=softcap,
        valid_vocab_size=vocab,
        mask=mask,
    ).logprobs
    return given_log_masses(logprobs.index_select(0, active).to(dtype), tail)


def support_divergence(
    log_s: Tensor, log_t: Tensor, divergence: Divergence, factors: Tensor, active: Tensor, T: int
) -> DivergenceOutput:
    """From log-masses [n, K] of the active tokens, whose divergences factors [n] multiply."""
    values = _SupportDivergence.apply(log_s, log_t, divergence)
    loss = weighted_sum(values, factors)
    return DivergenceOutput(loss, spread(values.detach(), active, T), None, None)


@traceable(
    divergence_fields("student_hidden"),
    acc=["student_hidden", "student_weight", "teacher_logprobs"],
    by=["student_hidden", "student_weight", "bias"],
    of=["loss"],
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

    No [T, V] tensor is made. The tail decides what becomes of the tokens outside the support:
      bucket       They are one more outcome. For the KLs and the JSD the result is a lower bound of
                   the full divergence.
      renormalize  Both distributions are renormalised on the support. Only K logits per row are
                   made, without a full LM-head GEMM.
      ignore       The support's terms alone, each >= 0 (for a KL: a log(a/b) - a + b). Matching the
                   teacher on the support is optimal, and the mass outside is free.

    Args:
        student_hidden, student_weight, bias: [T, H], [V, H], [V] floating, differentiable.
        support_ids: [T, K] int64, distinct within a row.
        teacher_logprobs: [T, K] floating, nats, constant, at the same temperature.
        teacher_tail_logprob: [T] floating, the teacher's log-mass of the bucket; by default
            log(1 - sum of the K).

    For the divergences, the other arguments and the errors see `distillation_divergence`.

    Returns:
        The loss and divergence [T]; no log-probs and no entropy.
    """
    student = HeadInputs(student_hidden, student_weight, bias, temperature, logit_softcap)
    shapes = Shapes()
    student.check(shapes, mask, ("student_hidden", "student_weight", "bias", "logit_softcap"))
    shapes.check("teacher_logprobs", teacher_logprobs, "TK")
    shapes.check("teacher_tail_logprob", teacher_tail_logprob, "T", optional=True)
    check_choice("tail", tail, TAILS)
    if teacher_tail_logprob is not None and tail != "bucket":
        raise ValueError(f"teacher_tail_logprob belongs to tail='bucket', got tail={tail!r}")
    rule = Divergence(divergence, alpha, normalization, beta)
    vocab = check_vocab(valid_vocab_size, student_weight.shape[0])
    T = len(student_hidden)
    active = check_loss(shapes, T, mask, weights, None, vocab, denominator)
    shapes.ids("support_ids", support_ids, "TK", active, vocab)

    dtype = acc_dtype(student_hidden, student_weight, teacher_logprobs)
    ids = support_ids.index_select(0, active)
    log_s = model_log_masses(student, ids, tail, vocab, dtype, active, mask)
    with torch.no_grad():
        rest = None
        if teacher_tail_logprob is not None:
            rest = teacher_tail_logprob.index_select(0, active).to(dtype)
        on_support = teacher_logprobs.index_select(0, active).to(dtype)
        log_t = given_log_masses(on_support, tail, rest)
    factors = loss_factors(active, weights, denominator, dtype)
    return support_divergence(log_s, log_t, rule, factors, active, T)
