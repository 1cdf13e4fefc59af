"""Triton kernels for full-vocabulary divergences: the sums of a block of columns, and the gradient
by its logits.

There is one program per row; the specification is kernels/divergence.py. No term is kept between
the two kernels. The gradient makes them again from the logits, which costs less than writing and
reading [n, N] of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_math import DIVERGENCES, divergence_terms
from kernels.triton_rows import accumulator, block_of, logit_row, scalar


class Side(NamedTuple):
    """One model's logits [n, N], or [T, N] with row indices, and its rows' statistics [n]."""

    z: Tensor
    shift: Tensor
    log_total: Tensor


class Rule(NamedTuple):
    """A divergence by number (triton_math.DIVERGENCES) and its parameters."""

    kind: int
    alpha: float
    scale: float
    beta: float


def make_rule(name: str, alpha: float, normalization: str, beta: float) -> Rule:
    if name == "jsd" and beta in (0, 1):
        name = "reverse_kl" if beta == 1 else "forward_kl"
    if name == "power" and alpha == 0:
        name = "reverse_kl"
    return Rule(DIVERGENCES[name], alpha, alpha if normalization == "none" else 1.0, beta)


@triton.jit
def _log_probs(z_ptr, columns, inside, shift, log_total, temper):
    z = tl.load(z_ptr + columns, mask=inside, other=0.0).to(shift.dtype) * temper
    # The tail's terms are 0.
    return tl.where(inside, z - shift - log_total, float("-inf"))


@triton.jit
def _row(z_ptr, stride, rows_ptr, shift_ptr, log_total_ptr, i, HAS_ROWS: tl.constexpr):
    """(pointer to its logits, shift, log_total) of one model's row i."""
    z_ptr = logit_row(z_ptr, stride, rows_ptr, i, HAS_ROWS)
    return z_ptr, tl.load(shift_ptr + i), tl.load(log_total_ptr + i)


@triton.jit(do_not_specialize=["N"])
def _sums_kernel(
    s_ptr,
    s_stride,
    t_ptr,
    t_stride,
    rows_ptr,
    N,
    temper: tl.float64,
    s_shift_ptr,
    s_log_total_ptr,
    t_shift_ptr,
    t_log_total_ptr,
    alpha: tl.float64,
    scale: tl.float64,
    beta: tl.float64,
    values_ptr,
    by_s_ptr,
    by_t_ptr,
    KIND: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_T: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    s_ptr, s_shift, s_log_total = _row(
        s_ptr, s_stride, rows_ptr, s_shift_ptr, s_log_total_ptr, i, HAS_ROWS
    )
    t_ptr, t_shift, t_log_total = _row(
        t_ptr, t_stride, rows_ptr, t_shift_ptr, t_log_total_ptr, i, HAS_ROWS
    )
    temper = scalar(temper, ACC)
    alpha = scalar(alpha, ACC)
    scale = scalar(scale, ACC)
    beta = scalar(beta, ACC)
    value = tl.load(values_ptr + i)
    of_s = tl.load(by_s_ptr + i)
    of_t = value * 0.0
    if HAS_T:
        of_t = tl.load(by_t_ptr + i)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < N
        ls = _log_probs(s_ptr, columns, inside, s_shift, s_log_total, temper)
        lt = _log_probs(t_ptr, columns, inside, t_shift, t_log_total, temper)
        terms, by_s, by_t = divergence_terms(ls, lt, alpha, scale, beta, KIND)
        value += tl.sum(terms, 0)
        of_s += tl.sum(by_s, 0)
        if HAS_T:
            of_t += tl.sum(by_t, 0)
    tl.store(values_ptr + i, value)
    tl.store(by_s_ptr + i, of_s)
    if HAS_T:
        tl.store(by_t_ptr + i, of_t)


def add_sums(
    student: Side,
    teacher: Side,
    rule: Rule,
    values: Tensor,
    by_student: Tensor,
    by_teacher: Tensor | None,
    *,
    columns: int | None = None,
    rows: Tensor | None = None,
    temper: float = 1.0,
) -> None:
    """Add a block's terms and their derivatives by the log-probs to the row sums [n], in place.

    columns and rows are as in triton_rows.fold. temper multiplies both models' logits.
    """
    n, N = len(values), student.z.shape[1] if columns is None else columns
    if n == 0:
        return
    with torch.cuda.device_of(values):
        _sums_kernel[(n,)](
            student.z,
            student.z.stride(0),
            teacher.z,
            teacher.z.stride(0),
            rows,
            N,
            temper,
            student.shift,
            student.log_total,
            teacher.shift,
            teacher.log_total,
            rule.alpha,
            rule.scale,
            rule.beta,
            values,
            by_student,
            by_teacher,
            KIND=rule.kind,
            HAS_ROWS=rows is not None,
            HAS_T=by_teacher is not None,
            ACC=accumulator(values),
            **block_of(N, 2048),
        )


@triton.jit(do_not_specialize=["N"])
def _grad_kernel(
    s_ptr,
    s_stride,
    t_ptr,
    t_stride,
    out_ptr,
    out_stride,
    rows_ptr,
    N,
    temper: tl.float64,
    s_shift_ptr,
    s_log_total_ptr,
    t_shift_ptr,
    t_log_total_ptr,
    alpha: tl.float64,
    scale: tl.float64,
    beta: tl.float64,
    sums_ptr,
    factors_ptr,
    KIND: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    OF_TEACHER: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    s_ptr, s_shift, s_log_total = _row(
        s_ptr, s_stride, rows_ptr, s_shift_ptr, s_log_total_ptr, i, HAS_ROWS
    )
    t_ptr, t_shift, t_log_total = _row(
        t_ptr, t_stride, rows_ptr, t_shift_ptr, t_log_total_ptr, i, HAS_ROWS
    )
    out_ptr = logit_row(out_ptr, out_stride, rows_ptr, i, HAS_ROWS)
    temper = scalar(temper, ACC)
    alpha = scalar(alpha, ACC)
    scale = scalar(scale, ACC)
    beta = scalar(beta, ACC)
    total = tl.load(sums_ptr + i)
    factor = tl.load(factors_ptr + i)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < N
        ls = _log_probs(s_ptr, columns, inside, s_shift, s_log_total, temper)
        lt = _log_probs(t_ptr, columns, inside, t_shift, t_log_total, temper)
        _, by_s, by_t = divergence_terms(ls, lt, alpha, scale, beta, KIND)
        # Through the softmax: dz = g - p sum(g).
        if OF_TEACHER:  # noqa: SIM108
            dz = by_t - tl.exp(lt) * total
        else:
            dz = by_s - tl.exp(ls) * total
        tl.store(out_ptr + columns, (dz * factor).to(out_ptr.dtype.element_ty), mask=inside)


def grad(
    student: Side,
    teacher: Side,
    rule: Rule,
    sums: Tensor,
    factors: Tensor,
    out: Tensor,
    *,
    of_teacher: bool = False,
    columns: int | None = None,
    rows: Tensor | None = None,
    temper: float = 1.0,
) -> None:
    """Write factors [n] * the gradient by the student's (or the teacher's) tempered logits to
    `out`.

    sums [n] are those of the derivatives by that side's log-probs, over the whole vocabulary. out
    may be that side's z.
    """
    n, N = len(factors), student.z.shape[1] if columns is None else columns
    if n == 0:
        return
    with torch.cuda.device_of(out):
        _grad_kernel[(n,)](
            student.z,
            student.z.stride(0),
            teacher.z,
            teacher.z.stride(0),
            out,
            out.stride(0),
            rows,
            N,
            temper,
            student.shift,
            student.log_total,
            teacher.shift,
            teacher.log_total,
            rule.alpha,
            rule.scale,
            rule.beta,
            sums,
            factors,
            KIND=rule.kind,
            HAS_ROWS=rows is not None,
            OF_TEACHER=of_teacher,
            ACC=accumulator(factors),
            **block_of(N, 2048),
        )
