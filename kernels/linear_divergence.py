"""Full-vocabulary divergences from hidden states and LM heads, in one shot."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import use_triton
from kernels.checks import Shapes, check_scale, check_vocab
from kernels.divergence import Divergence, DivergenceOutput, check_loss, divergence_fields
from kernels.library import traceable
from kernels.policy_loss import loss_factors, weighted_sum
from kernels.rows import RowStats, acc_dtype, exp, slices
from kernels.tiled_head import (
    ByLogits,
    HeadGrads,
    HeadInputs,
    TiledHead,
    needs_grad,
    scaled_grad,
    spread_constants,
    stream_logits,
)

if TYPE_CHECKING:
    from kernels.triton_divergence import Side


class _View:
    """One model's logits of a chunk of rows, and then the gradient of a function of their
    log-probs.

    hidden is [T, H]; a chunk has room for `room` rows. `differentiated`: whether any of the view's
    inputs needs a gradient.
    """

    def __init__(
        self, head: TiledHead, hidden: Tensor, grads: HeadGrads, differentiated: bool, room: int
    ) -> None:
        self.head, self.hidden, self.grads = head, hidden, grads
        self.differentiated = differentiated
        self.workspace = head.workspace(room)

    def load(self, rows: Tensor, ids: Tensor | None = None, entropy: bool = False) -> None:
        """Make the logits of the token positions `rows` [n]; ids [n] are their target tokens."""
        columns = None if ids is None else ids[:, None]
        stats = RowStats(len(rows), self.head.dtype, rows.device, columns, entropy)
        stream_logits(self.head, self.hidden, rows, stats, self.workspace)
        self.rows, self.final = rows, stats.final()
        self.by_logprobs: list[Tensor] = []
        self.sums = torch.zeros_like(self.final.total)

    def logits(self, i: int) -> Tensor:
        """Of tile i, [n, N]."""
        return self.workspace[i][: len(self.rows)]

    def side(self, i: int) -> "Side":
        """Tile i for the Triton kernels."""
        from kernels import triton_divergence

        return triton_divergence.Side(self.logits(i), self.final.shift, self.final.log_total)

    def take(self, by_logprobs: Tensor) -> None:
        """The next tile's derivative by its log-probs, [n, N]."""
        if self.differentiated:
            self.by_logprobs.append(by_logprobs)
            self.sums += by_logprobs.sum(1)

    def add_grads(self, by_logits: ByLogits) -> None:
        if self.differentiated:
            self.grads.add_rows(self.head, self.hidden, self.rows, by_logits, self.workspace)

    def by_logits(self, factors: Tensor) -> ByLogits:
        """Through the softmax, dz = g - p sum(g) with the derivatives taken; factors [n] multiply
        the rows."""
        of_p = (-self.sums / self.final.total)[:, None]

        def gradient(z: Tensor, at: slice, v0: int, dtype: torch.dtype) -> Tensor:
            g = self.by_logprobs[v0 // self.head.columns]
            z.sub_(self.final.shift[:, None])
            unnormalised = exp(z, out=z)
            return unnormalised.mul_(of_p).add_(g).mul_(factors[:, None]).to(dtype)

        return gradient


def _chunk(student: _View, teacher: _View, divergence: Divergence, factors: Tensor) -> Tensor:
    """The divergence [n] of the loaded rows; their gradients, times factors [n], are added to the
    views'."""
    if use_triton(factors):
        return _triton_chunk(student, teacher, divergence, factors)
    values = torch.zeros_like(factors)
    for i in range(len(student.workspace)):
        log_s, log_t = (view.final.log_probs(view.logits(i)) for view in (student, teacher))
        terms, by_student, by_teacher = divergence.terms(log_s, log_t)
        values += terms.sum(1)
        student.take(by_student)
        teacher.take(by_teacher)
    for view in (student, teacher):
        view.add_grads(view.by_logits(factors))
    return values


def _triton_chunk(
    student: _View, teacher: _View, divergence: Divergence, factors: Tensor
) -> Tensor:
    """The same; the terms are made twice rather than kept."""
    from kernels import triton_divergence

    rule = divergence.for_triton()
    values = torch.zeros_like(factors)
    teacher_sums = teacher.sums if teacher.differentiated else None
    for i in range(len(student.workspace)):
        triton_divergence.add_sums(
            student.side(i), teacher.side(i), rule, values, student.sums, teacher_sums
        )

    def gradient_of(view: _View) -> ByLogits:
        def by_logits(z: Tensor, at: slice, v0: int, dtype: torch.dtype) -> Tensor:
            i = v0 // student.head.columns
            out = torch.empty(z.shape, dtype=dtype, device=z.device)
            triton_divergence.grad(
                student.side(i),
                teacher.side(i),
                rule,
                view.sums,
                factors,
                out,
                of_teacher=view is teacher,
            )
            return out

        return by_logits

    for view in (student, teacher):
        view.add_grads(gradient_of(view))
    return values


class _FusedLinearDivergence(torch.autograd.Function):
    """Both heads' logits of a chunk of rows are kept until their gradient is made.

    With needs_teacher (self-distillation: both views share one head) the teacher view's gradient
    joins the same dW.
    """

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        teacher_hidden,
        head: TiledHead,
        teacher_head: TiledHead,
        active,
        ids,
        factors,
        divergence: Divergence,
        with_entropy,
        needs,
        needs_teacher,
    ):
        n = len(active)
        grads = HeadGrads(head, hidden, needs)
        teacher_grads = HeadGrads(teacher_head, teacher_hidden, (needs_teacher[0], False, False))
        teacher_grads.weight, teacher_grads.bias = grads.weight, grads.bias
        values = torch.zeros_like(factors)
        logprobs = None if ids is None else torch.zeros_like(factors)
        entropy = torch.zeros_like(factors) if with_entropy else None
        # The logits of either model and their derivatives; the teacher's only if asked for.
        size = head.chunk_rows(workspaces=4 if any(needs_teacher) else 3)
        room = min(size, n)
        student = _View(head, hidden, grads, any(needs), room)
        teacher = _View(teacher_head, teacher_hidden, teacher_grads, any(needs_teacher), room)
        for at in slices(n, size):
            rows = active[at]
            student.load(rows, None if ids is None else ids.index_select(0, rows), with_entropy)
            teacher.load(rows)
            values[at] = _chunk(student, teacher, divergence, factors[at])
            if ids is not None:
                logprobs[at] = student.final.logprobs[:, 0]
            if with_entropy:
                entropy[at] = student.final.entropy
        outputs = spread_constants(ctx, [values, logprobs, entropy], active, len(hidden))
        ctx.save_for_backward(*grads.as_tuple(), teacher_grads.hidden)
        bias_dtype = None if bias is None else bias.dtype
        ctx.dtypes = hidden.dtype, weight.dtype, bias_dtype, teacher_hidden.dtype
        return weighted_sum(values, factors), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        grads = (scaled_grad(g, upstream, d) for g, d in zip(ctx.saved_tensors, ctx.dtypes))
        return *grads, *[None] * 9


def linear_divergence(
    student: HeadInputs,
    teacher_hidden: Tensor,
    head: TiledHead,
    teacher_head: TiledHead,
    active: Tensor,
    ids: Tensor | None,
    factors: Tensor,
    divergence: Divergence,
    *,
    with_entropy: bool = False,
    shared: bool = False,
) -> DivergenceOutput:
    """Checked arguments to the one-shot function.

    ids [T] are the tokens whose student log-probs are returned; factors [n] multiply the active
    tokens. `shared`: one head, and both views are differentiated.
    """
    hidden, weight, bias, *_ = student
    needs_teacher = needs_grad(teacher_hidden, weight, bias) if shared else (False,) * 3
    outputs = _FusedLinearDivergence.apply(
        hidden,
        weight,
        bias,
        teacher_hidden if shared else teacher_hidden.detach(),
        head,
        teacher_head,
        active,
        ids,
        factors,
        divergence,
        with_entropy,
        needs_grad(hidden, weight, bias),
        needs_teacher,
    )
    return DivergenceOutput(*outputs)


@traceable(
    divergence_fields("student_hidden", ids="token_ids", entropy="return_entropy"),
    acc=["student_hidden", "student_weight", "teacher_hidden", "teacher_weight"],
    by=["student_hidden", "student_weight", "student_bias"],
    of=["loss"],
)
def fused_linear_distillation_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
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
    loss_scale: float | Tensor = 1.0,
    valid_vocab_size: int | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    return_entropy: bool = False,
) -> DivergenceOutput:
    """`distillation_divergence` from hidden states and LM heads, with the gradient made in the
    forward.

    Only a chunk of rows' logits exists at a time. Logits are softcap(hidden @ weight.T + bias) /
    temperature. Student and teacher may differ in hidden size and dtype. Gradients are accumulated
    in float32 (float64 for float64 inputs), and a frozen head costs no dW.

    Args:
        student_hidden, student_weight, student_bias: [T, H], [V, H], [V] floating, differentiable.
        teacher_hidden, teacher_weight, teacher_bias: [T, H'], [V', H'], [V'] floating, constant.
        loss_scale: a number or 0-dim tensor that multiplies the loss.
        valid_vocab_size: both heads are cut to it, needed where V != V'.
        student_logit_softcap, teacher_logit_softcap: as in `fused_linear_logprobs`.

    The other arguments, the result and the errors are those of `distillation_divergence`.
    """
    student = HeadInputs(
        student_hidden, student_weight, student_bias, temperature, student_logit_softcap
    )
    teacher = HeadInputs(
        teacher_hidden, teacher_weight, teacher_bias, temperature, teacher_logit_softcap
    )
    names = ("hidden", "weight", "bias", "logit_softcap")
    shapes = Shapes()
    student.check(shapes, mask, tuple(f"student_{name}" for name in names))
    teacher.check(shapes, None, tuple(f"teacher_{name}" for name in names), "Thv")
    vocab = check_vocab(valid_vocab_size, student_weight.shape[0], teacher_weight.shape[0])
    rule = Divergence(divergence, alpha, normalization, beta)
    check_scale("loss_scale", loss_scale)
    active = check_loss(shapes, len(student_hidden), mask, weights, token_ids, vocab, denominator)
    dtype = acc_dtype(student_hidden, student_weight, teacher_hidden, teacher_weight)
    width = max(student_hidden.shape[1], teacher_hidden.shape[1])
    return linear_divergence(
        student,
        teacher_hidden,
        student.tiled(vocab, dtype, width),
        teacher.tiled(vocab, dtype, width),
        active,
        token_ids,
        loss_factors(active, weights, denominator, dtype, loss_scale),
        rule,
        with_entropy=return_entropy,
    )
