"""Full-vocabulary divergences between a student's and a teacher's next-token distributions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import use_triton
from kernels.checks import Shapes, check_choice, check_denominator, check_number, check_vocab
from kernels.library import traceable
from kernels.policy_loss import loss_factors, weighted_sum
from kernels.rewards import box_cox_gap, check_power
from kernels.rows import (
    RowStats,
    Softmax,
    acc_dtype,
    exp,
    gradient_buffer,
    load_logits,
    row_blocks,
    unit_stride,
)
from kernels.tiled_head import active_rows, spread_constants
from kernels.traced import NEVER, Field

if TYPE_CHECKING:
    from kernels.triton_divergence import Rule, Side

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "power")


class DivergenceOutput(NamedTuple):
    """loss: differentiable scalar; the rest is detached: [T] tensors in nats, 0 at masked tokens.

    divergence: unweighted. logprobs: the student's, of token_ids (None without them). entropy: the
    student's.
    """

    loss: Tensor
    divergence: Tensor
    logprobs: Tensor | None
    entropy: Tensor | None


def divergence_fields(tokens: str, ids: str = NEVER, entropy: str = NEVER) -> dict[str, Field]:
    """Those of a DivergenceOutput: `tokens` has T rows, and the others are Field's `when`."""
    return {
        "loss": Field(),
        "divergence": Field(tokens),
        "logprobs": Field(tokens, when=ids),
        "entropy": Field(tokens, when=entropy),
    }


def bregman_terms(log_q: Tensor, log_p: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Terms of B(q || p) = 1/(a(a+1)) sum q^(a+1) - (a+1) q p^a + a p^(a+1), and its derivatives by
    log_q and log_p.

    The inputs are log-masses of one shape. alpha = 0 is the limit sum q log(q/p) - q + p, the KL
    divergence.

    Every term is >= 0, also in rounding. With r = (p^a - q^a)/a a term is
    [p^a (p - q) - q r]/(a+1), which loses its digits where p is near q. There the common factor
    q max(p,q)^a is taken out, and both differences are made by expm1.
    """
    q, p = exp(log_q), exp(log_p)
    gap = log_p - log_q
    # Where q is 0 the gap is inf or NaN, or may as well be.
    gone = q == 0
    if alpha == 0:
        p_power, r = 1.0, gap.masked_fill(gone, 0)
        near = q * (torch.expm1(gap) - gap)
    else:
        p_power = torch.exp(alpha * log_p)
        top = torch.maximum(log_p, log_q)
        anchor = torch.exp(alpha * top)
        box_cox = box_cox_gap(gap.abs(), alpha) * gap.sign()
        r = (anchor * box_cox).masked_fill_(gone, 0)
        near = q * anchor * (torch.exp(alpha * (log_p - top)) * torch.expm1(gap) - box_cox)
    by_q = -q * r
    by_p = p_power * (p - q)
    far = by_p + by_q
    terms = torch.where(gap.abs() < 1, near, far).clamp_min_(0).div_(alpha + 1)
    return terms, by_q, by_p


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

    def for_triton(self) -> "Rule":
        """The same for the Triton kernels."""
        from kernels import triton_divergence

        return triton_divergence.make_rule(self.name, self.alpha, self.normalization, self.beta)

    def terms(self, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(terms >= 0, their derivatives by log_s, by log_t) of the student's and the teacher's
        log-masses, which need not be normalised."""
        if self.name == "reverse_kl" or (self.name == "jsd" and self.beta == 1):
            return bregman_terms(log_s, log_t, 0)
        if self.name == "forward_kl" or (self.name == "jsd" and self.beta == 0):
            terms, by_t, by_s = bregman_terms(log_t, log_s, 0)
            return terms, by_s, by_t
        if self.name == "power":
            terms, by_s, by_t = bregman_terms(log_s, log_t, self.alpha)
            if self.normalization == "none":
                return terms * self.alpha, by_s * self.alpha, by_t * self.alpha
            return terms, by_s, by_t
        return self._jsd_terms(log_s, log_t)

    def _jsd_terms(self, log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """beta KL(t || m) + (1 - beta) KL(s || m) with the mixture m = beta t + (1 - beta) s."""
        beta = self.beta
        # NaN where both are -inf.
        gap = (log_t - log_s).nan_to_num_(0)
        share_of_smaller = (gap > 0).to(gap.dtype).mul_(1 - 2 * beta).add_(beta)
        larger = torch.maximum(log_s, log_t)
        log_m = larger + torch.log1p(share_of_smaller * torch.expm1(-gap.abs()))
        of_s, by_s, _ = bregman_terms(log_s, log_m, 0)
        of_t, by_t, _ = bregman_terms(log_t, log_m, 0)
        # The mixture's own derivative cancels between the two halves.
        return beta * of_t + (1 - beta) * of_s, (1 - beta) * by_s, beta * by_t


@dataclass(frozen=True)
class _LogitPair:
    """Two models' logits [T, V] and [T, V'] at the active tokens, with their softmax statistics."""

    logits: tuple[Tensor, Tensor]
    active: Tensor
    vocab: int
    temperature: float
    finals: tuple[Softmax, Softmax]

    def block_terms(self, at: slice, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor]:
        """(student log-probs, terms, derivative of the terms by them) of some rows, [n, vocab]."""
        rows = self.active[at]
        log_s, log_t = (
            final.log_probs(
                load_logits(logits, rows, self.vocab, self.temperature, final.total.dtype), at
            )
            for logits, final in zip(self.logits, self.finals)
        )
        terms, by_student, _ = divergence.terms(log_s, log_t)
        return log_s, terms, by_student

    def sides(self) -> "list[Side]":
        """The same for the Triton kernels."""
        from kernels import triton_divergence

        return [
            triton_divergence.Side(unit_stride(logits), final.shift, final.log_total)
            for logits, final in zip(self.logits, self.finals)
        ]

    def sums(self, divergence: Divergence) -> tuple[Tensor, Tensor]:
        """Of the terms and of their derivatives by the student's log-probs, [n]."""
        total = self.finals[0].total
        values, slopes = torch.zeros_like(total), torch.zeros_like(total)
        if use_triton(self.logits[0]):
            from kernels import triton_divergence

            triton_divergence.add_sums(
                *self.sides(),
                divergence.for_triton(),
                values,
                slopes,
                None,
                columns=self.vocab,
                rows=self.active,
                temper=1 / self.temperature,
            )
            return values, slopes
        for at in row_blocks(len(self.active), self.vocab):
            _, terms, by_student = self.block_terms(at, divergence)
            values[at], slopes[at] = terms.sum(1), by_student.sum(1)
        return values, slopes

    def write_grad(
        self, divergence: Divergence, slopes: Tensor, factors: Tensor, grad: Tensor
    ) -> Tensor:
        """Write factors [n] times the gradient by the tempered student logits into grad [T, V]."""
        if use_triton(self.logits[0]):
            from kernels import triton_divergence

            out = unit_stride(grad)
            triton_divergence.grad(
                *self.sides(),
                divergence.for_triton(),
                slopes,
                factors,
                out,
                columns=self.vocab,
                rows=self.active,
                temper=1 / self.temperature,
            )
            return grad if out.data_ptr() == grad.data_ptr() else grad.copy_(out)
        for at in row_blocks(len(self.active), self.vocab):
            log_s, _, by_student = self.block_terms(at, divergence)
            # Through the softmax: dz = g - p sum(g).
            dz = by_student.sub_(exp(log_s, out=log_s).mul_(slopes[at, None])).mul_(
                factors[at, None]
            )
            grad[:, : self.vocab].index_copy_(0, self.active[at], dz.to(grad.dtype))
        return grad


class _Divergence(torch.autograd.Function):
    """From two logits tensors.

    The backward makes the terms again instead of keeping [T, V] of them.
    """

    @staticmethod
    def forward(
        ctx,
        student,
        teacher,
        active,
        ids,
        factors,
        divergence: Divergence,
        temperature,
        vocab,
        entropy,
        inplace,
    ):
        n, dtype, device = len(active), factors.dtype, student.device
        columns = None if ids is None else ids.index_select(0, active)[:, None]
        student_stats = RowStats(n, dtype, device, columns, entropy)
        teacher_stats = RowStats(n, dtype, device)
        student_stats.fold_logits(student, active, vocab, temperature)
        teacher_stats.fold_logits(teacher, active, vocab, temperature)
        finals = student_stats.final(), teacher_stats.final()
        pair = _LogitPair((student, teacher), active, vocab, temperature, finals)
        values, slopes = pair.sums(divergence)
        ctx.save_for_backward(student, teacher, active, factors, slopes)
        ctx.args = divergence, vocab, temperature, finals, inplace
        logprobs = None if ids is None else finals[0].logprobs[:, 0]
        outputs = [values, logprobs, finals[0].entropy]
        outputs = spread_constants(ctx, outputs, active, len(student))
        return weighted_sum(values, factors), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        student, teacher, active, factors, slopes = ctx.saved_tensors
        divergence, vocab, temperature, finals, inplace = ctx.args
        pair = _LogitPair((student, teacher), active, vocab, temperature, finals)
        grad = gradient_buffer(student, active, vocab, inplace)
        factors = factors * (upstream / temperature)
        return pair.write_grad(divergence, slopes, factors, grad), *[None] * 9


@traceable(
    divergence_fields("student_logits", ids="token_ids", entropy="return_entropy"),
    acc=["student_logits", "teacher_logits"],
    by=["student_logits"],
    of=["loss"],
)
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

    loss = sum_t weights_t D_t / denominator over unmasked tokens. With q the student's and p the
    teacher's distribution at softmax(logits / temperature), D is
      reverse_kl  KL(q || p)
      forward_kl  KL(p || q)
      jsd         beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. beta 0 is
                  the forward and beta 1 the reverse KL, as in TRL's GKD (arXiv 2306.13649).
      power       B = 1/(a(a+1)) sum q^(a+1) - (a+1) q p^a + a p^(a+1) with normalization="box_cox",
                  alpha B with "none". alpha 0 is the reverse KL. It is the exact full-vocabulary
                  PowerOPD loss (arXiv 2606.17199): grad B = -E_{y~q}[(p^a - q^a)/a grad log q(y)].
    All are summed from terms that are >= 0 one by one. Where the student gives mass to a token that
    the teacher excludes (-inf), the reverse KL is inf, as it should be.

    Args:
        student_logits: [T, V] floating, differentiable.
        teacher_logits: [T, V'] floating, constant.
        denominator: a number or 0-dim tensor, above 0.
        divergence, alpha, normalization, beta: as above.
        temperature: above 0.
        mask: [T] bool or uint8. Masked tokens: loss and gradient exactly 0, may hold NaN.
        weights: [T] floating, constant.
        token_ids: [T] int64, the tokens whose student log-probs are returned.
        valid_vocab_size: the columns that take part, needed where V != V'.
        return_entropy: whether to return the student's entropies.
        inplace_backward: as in `selective_logprobs`.

    Returns:
        The loss, divergence [T], logprobs [T] or None, entropy [T] or None: nats, float32 (float64
        for float64 inputs).

    Raises:
        TypeError, ValueError: shapes, dtypes, choices, bounds.
        IndexError: an id outside the valid vocabulary.
    """
    shapes = Shapes()
    shapes.check("student_logits", student_logits, "TV")
    shapes.check("teacher_logits", teacher_logits, "Tv")
    shapes.check("mask", mask, "T", "bool or uint8", optional=True)
    check_number("temperature", temperature)
    vocab = check_vocab(valid_vocab_size, student_logits.shape[1], teacher_logits.shape[1])
    rule = Divergence(divergence, alpha, normalization, beta)
    active = check_loss(shapes, len(student_logits), mask, weights, token_ids, vocab, denominator)
    dtype = acc_dtype(student_logits, teacher_logits)
    outputs = _Divergence.apply(
        student_logits,
        teacher_logits.detach(),
        active,
        token_ids,
        loss_factors(active, weights, denominator, dtype),
        rule,
        temperature,
        vocab,
        return_entropy,
        inplace_backward,
    )
    return DivergenceOutput(*outputs)


def check_loss(
    shapes: Shapes,
    T: int,
    mask: Tensor | None,
    weights: Tensor | None,
    token_ids: Tensor | None,
    vocab: int,
    denominator: float | Tensor,
) -> Tensor:
    """Check what every divergence takes; returns the positions of the active tokens."""
    shapes.check("weights", weights, "T", optional=True)
    check_denominator(denominator)
    active = active_rows(mask, T, shapes.device)
    if token_ids is not None:
        shapes.ids("token_ids", token_ids, "T", active, vocab)
    return active
