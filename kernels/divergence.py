"""Full-vocabulary divergences between a student's and a teacher's next-token distributions."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import use_triton
from kernels.checks import (
    Shapes,
    check_choice,
    check_denominator,
    check_number,
    check_vocab,
)
from kernels.policy_loss import loss_factors, weighted_sum
from kernels.rewards import box_cox_gap, check_power
from kernels.rows import (
    RowStats,
    Softmax,
    acc_dtype,
    gradient_buffer,
    load_logits,
    row_blocks,
    unit_stride,
)
from kernels.stream import active_rows, spread

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "power")


class DivergenceOutput(NamedTuple):
    """loss: differentiable scalar; the rest is detached: [T] tensors in nats, 0 at masked rows.

    divergence: unweighted; logprobs: the student's, of token_ids (None without them); entropy: the
    student's."""

    loss: Tensor
    divergence: Tensor
    logprobs: Tensor | None
    entropy: Tensor | None


def bregman_terms(lq: Tensor, lp: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Terms of B(q || p) = 1/(a(a+1)) sum q^(a+1) - (a+1) q p^a + a p^(a+1), and derivatives by lq
    and lp.

    lq, lp: log-masses. alpha = 0 is the limit sum q log(q/p) - q + p, the KL divergence. Every term
        is >= 0,
    also in rounding: with r = (p^a - q^a)/a a term is [p^a (p - q) - q r]/(a+1), which loses its
    digits where p is near q, so there the common factor q max(p,q)^a is taken out and both
    differences are made by expm1."""
    q, p = lq.exp(), lp.exp()
    d = lp - lq
    gone = q == 0  # d is then inf or NaN, or may as well be
    if alpha == 0:
        power, r = 1.0, d.masked_fill(gone, 0)
        near = q * (torch.expm1(d) - d)
    else:
        power = torch.exp(alpha * lp)
        top = torch.maximum(lp, lq)
        anchor, gap = torch.exp(alpha * top), box_cox_gap(d.abs(), alpha) * d.sign()
        r = (anchor * gap).masked_fill_(gone, 0)
        near = q * anchor * (torch.exp(alpha * (lp - top)) * torch.expm1(d) - gap)
    by_q = -q * r
    by_p = power * (p - q)
    far = by_p + by_q
    return torch.where(d.abs() < 1, near, far).clamp_min_(0).div_(alpha + 1), by_q, by_p


@dataclass(frozen=True)
class Divergence:
    """A divergence of a student from a teacher, as terms over outcomes whose log-masses are
    given."""

    name: str
    alpha: float = 1.0
    normalization: str = "box_cox"
    beta: float = 0.5

    def __post_init__(self) -> None:
        check_choice("divergence", self.name, DIVERGENCES)
        if self.name == "power":
            check_power(self.alpha, self.normalization)
        check_number("beta", self.beta, high=1.0, strict=False)

    def for_triton(self):
        """The same as a `triton_divergence.Rule`."""
        from kernels import triton_divergence

        return triton_divergence.make_rule(self.name, self.alpha, self.normalization, self.beta)

    def terms(self, ls: Tensor, lt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(terms >= 0, their derivatives by ls, by lt); the log-masses need not be normalised."""
        if self.name == "reverse_kl" or (self.name == "jsd" and self.beta == 1):
            return bregman_terms(ls, lt, 0)
        if self.name == "forward_kl" or (self.name == "jsd" and self.beta == 0):
            value, by_t, by_s = bregman_terms(lt, ls, 0)
            return value, by_s, by_t
        if self.name == "power":
            value, by_s, by_t = bregman_terms(ls, lt, self.alpha)
            if self.normalization == "none":
                value, by_s, by_t = value * self.alpha, by_s * self.alpha, by_t * self.alpha
            return value, by_s, by_t
        d = (lt - ls).nan_to_num_(0)  # NaN: both -inf
        share = (d > 0).to(d.dtype).mul_(1 - 2 * self.beta).add_(self.beta)  # of the smaller mass
        mixed = torch.maximum(ls, lt) + torch.log1p(share * torch.expm1(-d.abs()))
        of_s, by_s, _ = bregman_terms(ls, mixed, 0)
        of_t, by_t, _ = bregman_terms(lt, mixed, 0)
        # the mixture's own derivative cancels between the two halves
        return self.beta * of_t + (1 - self.beta) * of_s, (1 - self.beta) * by_s, self.beta * by_t


class _Divergence(torch.autograd.Function):
    """From two logits tensors; the backward makes the terms again instead of keeping [T, V] of
    them."""

    @staticmethod
    def forward(
        ctx, student, teacher, rows, ids, factors, divergence, temperature, vocab, entropy, inplace
    ):
        n, T = len(rows), len(student)
        columns = None if ids is None else ids.index_select(0, rows)[:, None]
        stats = (
            RowStats(n, factors.dtype, student.device, columns, entropy),
            RowStats(n, factors.dtype, student.device),
        )
        for one, logits in zip(stats, (student, teacher)):
            one.fold_logits(logits, rows, vocab, temperature)
        final = stats[0].final()
        ctx.args = divergence, temperature, vocab, (final, stats[1].final())
        ctx.inplace = inplace
        values, slopes = torch.zeros_like(factors), torch.zeros_like(factors)
        if use_triton(student):
            from kernels import triton_divergence

            triton_divergence.add_sums(
                *_sides(student, teacher, *ctx.args),
                divergence.for_triton(),
                values,
                slopes,
                None,
                columns=vocab,
                rows=rows,
                temper=1 / temperature,
            )
        else:
            for at, some in row_blocks(rows, vocab):
                _, terms, by_student = _block_terms(student, teacher, at, some, *ctx.args)
                values[at], slopes[at] = terms.sum(1), by_student.sum(1)
        ctx.save_for_backward(student, teacher, rows, factors, slopes)
        outputs = [
            spread(x, rows, T)
            for x in (values, None if ids is None else final.logprobs[:, 0], final.entropy)
        ]
        ctx.mark_non_differentiable(*(x for x in outputs if x is not None))
        return weighted_sum(values, factors), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        student, teacher, rows, factors, slopes = ctx.saved_tensors
        vocab, temperature = ctx.args[2], ctx.args[1]
        grad = gradient_buffer(student, rows, vocab, ctx.inplace)
        factors = factors * (upstream / temperature)
        if use_triton(student):
            from kernels import triton_divergence

            out = unit_stride(grad)
            triton_divergence.grad(
                *_sides(student, teacher, *ctx.args),
                ctx.args[0].for_triton(),
                slopes,
                factors,
                out,
                columns=vocab,
                rows=rows,
                temper=1 / temperature,
            )
            return grad.copy_(out) if out.data_ptr() != grad.data_ptr() else grad, *[None] * 9
        for at, some in row_blocks(rows, vocab):
            ls, _, by_student = _block_terms(student, teacher, at, some, *ctx.args)
            dz = by_student.sub_(ls.exp_().mul_(slopes[at, None])).mul_(factors[at, None])
            grad[:, :vocab].index_copy_(0, some, dz.to(grad.dtype))
        return grad, *[None] * 9


def _sides(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence,
    temperature: float,
    vocab: int,
    finals: tuple[Softmax, Softmax],
) -> tuple:
    """Both models' logits and row statistics for the Triton kernels."""
    from kernels import triton_divergence

    return tuple(
        triton_divergence.Side(unit_stride(logits), final.shift, final.log_l)
        for logits, final in zip((student, teacher), finals)
    )


def _block_terms(
    student: Tensor,
    teacher: Tensor,
    at: slice,
    some: Tensor,
    divergence: Divergence,
    temperature: float,
    vocab: int,
    finals: tuple[Softmax, Softmax],
) -> tuple[Tensor, ...]:
    """(student log-probs, terms, derivative of the terms by them) of some rows of two logits
    tensors."""
    ls, lt = (
        final.log_probs(load_logits(logits, some, vocab, temperature, final.l.dtype), at)
        for logits, final in zip((student, teacher), finals)
    )
    terms, by_student, _ = divergence.terms(ls, lt)
    return ls, terms, by_student


def distillation_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    denominator: float | Tensor,
    divergence: str = "reverse_kl",
    alpha: float = 1.0,
    normalization: str = "box_cox",
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    token_ids: Tensor | None = None,
    valid_vocab_size: int | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> DivergenceOutput:
    """Exact full-vocabulary divergence of the student from the teacher, from logits.

    loss = sum_t weights_t D_t / denominator over unmasked tokens. With q the student's
    and p the teacher's distribution at softmax(logits / temperature), D is
      reverse_kl  KL(q || p) forward_kl  KL(p || q) jsd         beta KL(p || m) + (1 - beta) KL(q ||
      m) with m = beta p + (1 - beta) q; beta 0 is the
                  forward and beta 1 the reverse KL, as in TRL's GKD (arXiv 2306.13649)
      power       B = 1/(a(a+1)) sum q^(a+1) - (a+1) q p^a + a p^(a+1) with normalization="box_cox"
      (alpha 0:
                  reverse KL), alpha B with "none": the exact full-vocabulary PowerOPD loss (arXiv
                  2606.17199), since grad B = -E_{y~q}[(p^a - q^a)/a grad log q(y)]
    All are summed from terms that are >= 0 one by one. Where the student gives mass to a token that
    the teacher excludes (-inf), the reverse KL is inf, as it should be.

    student_logits [T, V] floating, differentiable; teacher_logits [T, V'] floating, constant;
    valid_vocab_size: the columns that take part, needed where V != V'; mask [T] bool or uint8
    (masked: loss and gradient exactly 0, may hold NaN); weights [T] floating; token_ids [T] int64:
    whose student log-probs to return; denominator: a number or 0-dim tensor, above 0;
    inplace_backward: as in `selective_logprobs`. Returns DivergenceOutput(loss, divergence [T],
    logprobs [T] or None, entropy [T] or None), float32 (float64 for float64 inputs), nats.

    Raises TypeError, ValueError (shapes, dtypes, choices, bounds), IndexError (an id outside the
    valid vocabulary)."""
    shapes = Shapes()
    shapes.check("student_logits", student_logits, "TV")
    shapes.check("teacher_logits", teacher_logits, "Tv")
    shapes.check("mask", mask, "T", "bool or uint8", optional=True)
    check_number("temperature", temperature)
    vocab = check_vocab(valid_vocab_size, student_logits.shape[1], teacher_logits.shape[1])
    rule = Divergence(divergence, alpha, normalization, beta)
    rows = check_loss(shapes, len(student_logits), mask, weights, token_ids, vocab, denominator)
    factors = loss_factors(rows, weights, denominator, acc_dtype(student_logits, teacher_logits))
    return DivergenceOutput(
        *_Divergence.apply(
            student_logits,
            teacher_logits.detach(),
            rows,
            token_ids,
            factors,
            rule,
            temperature,
            vocab,
            return_entropy,
            inplace_backward,
        )
    )


def check_loss(
    shapes: Shapes,
    T: int,
    mask: Tensor | None,
    weights: Tensor | None,
    token_ids: Tensor | None,
    vocab: int,
    denominator: float | Tensor,
) -> Tensor:
    """Check what every divergence takes; returns the active rows."""
    shapes.check("weights", weights, "T", optional=True)
    check_denominator(denominator)
    rows = active_rows(mask, T, shapes.device)
    if token_ids is not None:
        shapes.ids("token_ids", token_ids, "T", rows, vocab)
    return rows
