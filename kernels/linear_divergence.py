"""Full-vocabulary divergences from hidden states and LM heads, in one shot."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import use_triton
from kernels.checks import Shapes, check_scale, check_vocab
from kernels.divergence import Divergence, DivergenceOutput, check_loss
from kernels.logprobs import check_head
from kernels.policy_loss import loss_factors, weighted_sum
from kernels.rows import RowStats, acc_dtype
from kernels.stream import (
    HeadGrads,
    LinearHead,
    make_head,
    needs_grad,
    scaled_grad,
    spread,
    stream_logits,
)


class _View:
    """One model's logits of a chunk of rows, and then the gradient of a function of their
    log-probs."""

    def __init__(
        self, head: LinearHead, hidden: Tensor, grads: HeadGrads, wanted: bool, room: int
    ) -> None:
        self.head, self.hidden, self.grads, self.wanted = head, hidden, grads, wanted
        self.workspace = head.workspace(room)

    def load(self, rows: Tensor, ids: Tensor | None = None, entropy: bool = False) -> None:
        columns = None if ids is None else ids[:, None]
        stats = RowStats(len(rows), self.head.dtype, rows.device, columns, entropy)
        stream_logits(self.head, self.hidden, rows, stats, self.workspace)
        self.rows, self.final = rows, stats.final()
        self.by_logprobs: list[Tensor] = []
        self.sums = torch.zeros_like(self.final.l)

    def logits(self, i: int) -> Tensor:
        """Of tile i, [n, N]."""
        return self.workspace[i][: len(self.rows)]

    def side(self, i: int):
        """Tile i for the Triton kernels."""
        from kernels import triton_divergence

        return triton_divergence.Side(self.logits(i), self.final.shift, self.final.log_l)

    def take(self, by_logprobs: Tensor) -> None:
        """The next tile's derivative by its log-probs."""
        if self.wanted:
            self.by_logprobs.append(by_logprobs)
            self.sums += by_logprobs.sum(1)

    def add_grads(self, by_logits: Callable[[Tensor, int, torch.dtype], Tensor]) -> None:
        if self.wanted:
            self.grads.add_rows(self.head, self.hidden, self.rows, by_logits, self.workspace)

    def by_logits(self, factors: Tensor) -> Callable[[Tensor, int, torch.dtype], Tensor]:
        """Through the softmax, dz = g - p sum(g) with the derivatives taken; factors [n] multiply
        the rows."""
        of_p = (-self.sums / self.final.l)[:, None]

        def gradient(z: Tensor, v0: int, dtype: torch.dtype) -> Tensor:
            p = z.sub_(self.final.shift[:, None]).exp_()
            return (
                p.mul_(of_p)
                .add_(self.by_logprobs[v0 // self.head.columns])
                .mul_(factors[:, None])
                .to(dtype)
            )

        return gradient


def _chunk(student: _View, teacher: _View, divergence: Divergence, factors: Tensor) -> Tensor:
    """The divergence [n] of the loaded rows; their gradients, times factors [n], are added to the
    views'."""
    values = torch.zeros_like(factors)
    if use_triton(factors):
        return _triton_chunk(student, teacher, divergence, factors, values)
    for i in range(len(student.workspace)):
        ls, lt = (view.final.log_probs(view.logits(i)) for view in (student, teacher))
        terms, by_student, by_teacher = divergence.terms(ls, lt)
        values += terms.sum(1)
        student.take(by_student)
        teacher.take(by_teacher)
    for view in (student, teacher):
        view.add_grads(view.by_logits(factors))
    return values


def _triton_chunk(
    student: _View, teacher: _View, divergence: Divergence, factors: Tensor, values: Tensor
) -> Tensor:
    """The same; the terms are made twice rather than kept."""
    from kernels import triton_divergence

    rule = divergence.for_triton()
    for i in range(len(student.workspace)):
        triton_divergence.add_sums(
            student.side(i),
            teacher.side(i),
            rule,
            values,
            student.sums,
            teacher.sums if teacher.wanted else None,
        )
    for view in (student, teacher):

        def by_logits(z: Tensor, v0: int, dtype: torch.dtype, view=view) -> Tensor:
            i, out = v0 // student.head.columns, torch.empty(z.shape, dtype=dtype, device=z.device)
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

        view.add_grads(by_logits)
    return values


class _FusedLinearDivergence(torch.autograd.Function):
    """Both heads' logits of a chunk of rows are kept until their gradient is made.

    With needs_teacher (self-distillation: both views share one head) the teacher view's gradient
    joins the same dW."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        teacher_hidden,
        head: LinearHead,
        teacher_head: LinearHead,
        rows,
        ids,
        factors,
        divergence: Divergence,
        with_entropy,
        needs,
        needs_teacher,
    ):
        n, T = len(rows), len(hidden)
        grads = HeadGrads(head, hidden, needs)
        teacher_grads = HeadGrads(teacher_head, teacher_hidden, (needs_teacher[0], False, False))
        teacher_grads.weight, teacher_grads.bias = grads.weight, grads.bias
        values = torch.zeros_like(factors)
        logprobs = None if ids is None else torch.zeros_like(factors)
        entropy = torch.zeros_like(factors) if with_entropy else None
        size = head.chunk_rows(workspaces=4 if any(needs_teacher) else 3)
        student = _View(head, hidden, grads, any(needs), min(size, n))
        teacher = _View(
            teacher_head, teacher_hidden, teacher_grads, any(needs_teacher), min(size, n)
        )
        for start in range(0, n, size):
            at = slice(start, start + size)
            student.load(
                rows[at], None if ids is None else ids.index_select(0, rows[at]), with_entropy
            )
            teacher.load(rows[at])
            values[at] = _chunk(student, teacher, divergence, factors[at])
            if ids is not None:
                logprobs[at] = student.final.logprobs[:, 0]
            if with_entropy:
                entropy[at] = student.final.entropy
        outputs = [spread(x, rows, T) for x in (values, logprobs, entropy)]
        ctx.mark_non_differentiable(*(x for x in outputs if x is not None))
        ctx.save_for_backward(*grads.as_tuple(), teacher_grads.hidden)
        ctx.dtypes = (
            hidden.dtype,
            weight.dtype,
            None if bias is None else bias.dtype,
            teacher_hidden.dtype,
        )
        return weighted_sum(values, factors), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        return *(scaled_grad(g, upstream, d) for g, d in zip(ctx.saved_tensors, ctx.dtypes)), *[
            None
        ] * 9


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    head: LinearHead,
    teacher_head: LinearHead,
    rows: Tensor,
    ids: Tensor | None,
    factors: Tensor,
    divergence: Divergence,
    *,
    with_entropy: bool = False,
    shared: bool = False,
) -> DivergenceOutput:
    """Checked arguments to the one-shot function; `shared`: one head, and both views are
    differentiated."""
    needs = needs_grad(hidden, weight, bias)
    needs_teacher = needs_grad(teacher_hidden, weight, bias) if shared else (False, False, False)
    return DivergenceOutput(
        *_FusedLinearDivergence.apply(
            hidden,
            weight,
            bias,
            teacher_hidden if shared else teacher_hidden.detach(),
            head,
            teacher_head,
            rows,
            ids,
            factors,
            divergence,
            with_entropy,
            needs,
            needs_teacher,
        )
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
    temperature. Student and teacher may differ in hidden size and dtype; the teacher is constant.
    Gradients are accumulated in float32 (float64 for float64 inputs), and a frozen head costs no
    dW.

    student_hidden [T, H], student_weight [V, H], student_bias [V]: floating, differentiable;
    teacher_hidden [T, H'], teacher_weight [V', H'], teacher_bias [V'] floating; valid_vocab_size:
    both heads are cut to it, needed where V != V'; loss_scale: a number or 0-dim
    tensor that multiplies the loss. The other arguments, the result and the errors
    are those of `distillation_divergence`."""
    shapes = Shapes()
    check_head(
        shapes,
        student_hidden,
        student_weight,
        student_bias,
        temperature,
        student_logit_softcap,
        mask,
        names=("student_hidden", "student_weight", "student_bias", "student_logit_softcap"),
    )
    check_head(
        shapes,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        temperature,
        teacher_logit_softcap,
        None,
        names=("teacher_hidden", "teacher_weight", "teacher_bias", "teacher_logit_softcap"),
        dims="Thv",
    )
    vocab = check_vocab(valid_vocab_size, student_weight.shape[0], teacher_weight.shape[0])
    rule = Divergence(divergence, alpha, normalization, beta)
    check_scale("loss_scale", loss_scale)
    rows = check_loss(shapes, len(student_hidden), mask, weights, token_ids, vocab, denominator)
    dtype = acc_dtype(student_hidden, student_weight, teacher_hidden, teacher_weight)
    width = max(student_hidden.shape[1], teacher_hidden.shape[1])
    head = make_head(
        dtype,
        student_hidden,
        student_weight,
        student_bias,
        temperature,
        student_logit_softcap,
        vocab,
        width,
    )
    teacher_head = make_head(
        dtype,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        temperature,
        teacher_logit_softcap,
        vocab,
        width,
    )
    factors = loss_factors(rows, weights, denominator, dtype, loss_scale)
    return linear_divergence(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        head,
        teacher_head,
        rows,
        token_ids,
        factors,
        rule,
        with_entropy=return_entropy,
    )
