"""Triton kernels for the row mathematics of kernels/rows.py: one program per row walks its logits.

A block's width depends on the row's length alone, so a row's result does not depend on the others.
Triton launches on the current device, which need not be that of the tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FLOOR = tl.constexpr(-1e4)  # kernels.rows.FLOOR


def block_of(columns: int, widest: int = 4096) -> dict:
    """The launch parameters of a kernel that walks rows of that many columns.

    A block is at most `widest` columns, so that registers suffice.
    """
    block = min(widest, triton.next_power_of_2(max(columns, 16)))
    return {"BLOCK": block, "num_warps": max(1, min(8, block * 8 // widest))}


def accumulator(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@triton.jit
def logit_row(z_ptr, stride, rows_ptr, i, HAS_ROWS: tl.constexpr):
    """Pointer to row i, or rows[i], of logits.

    It is made in 64 bits, because [T, V] has more than 2^31 elements.
    """
    row = i.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows_ptr + i)
    return z_ptr + row * stride


@triton.jit
def scalar(value, ACC: tl.constexpr):
    """A float64 argument in the dtype of the computation."""
    return tl.full((), value, ACC)


@triton.jit
def _store_targets(z_ptr, ids_ptr, target_ptr, i, N, K, v0, scale, ACC: tl.constexpr):
    """Row i's logits at those of its K target ids that lie in the columns v0..v0+N."""
    base = i.to(tl.int64) * K
    for k in range(K):
        local = tl.load(ids_ptr + base + k) - v0
        inside = (local >= 0) & (local < N)
        target = tl.load(z_ptr + local, mask=inside, other=0.0).to(ACC) * scale
        tl.store(target_ptr + base + k, target, mask=inside)


@triton.jit(do_not_specialize=["N", "K", "v0"])
def _fold_kernel(
    z_ptr,
    stride,
    rows_ptr,
    N,
    scale: tl.float64,
    peak_ptr,
    total_ptr,
    moment_ptr,
    ids_ptr,
    target_ptr,
    K,
    v0,
    HAS_ROWS: tl.constexpr,
    HAS_MOMENT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    z_ptr = logit_row(z_ptr, stride, rows_ptr, i, HAS_ROWS)
    scale = scalar(scale, ACC)
    peak = tl.load(peak_ptr + i)
    total = tl.load(total_ptr + i)
    moment = total * 0.0
    if HAS_MOMENT:
        moment = tl.load(moment_ptr + i)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < N
        z = tl.load(z_ptr + columns, mask=inside, other=0.0).to(ACC) * scale
        # The tail takes no part in the softmax.
        z = tl.where(inside, z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, 0))
        # -inf - -inf is NaN.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        x = z - shift
        old = peak - shift
        e = tl.exp(x)
        decay = tl.exp(old)
        if HAS_MOMENT:
            carried = (moment + total * tl.maximum(old, _FLOOR)) * decay
            moment = carried + tl.sum(tl.maximum(x, _FLOOR) * e, 0)
        total = total * decay + tl.sum(e, 0)
        peak = new_peak
    tl.store(peak_ptr + i, peak)
    tl.store(total_ptr + i, total)
    if HAS_MOMENT:
        tl.store(moment_ptr + i, moment)
    if HAS_IDS:
        _store_targets(z_ptr, ids_ptr, target_ptr, i, N, K, v0, scale, ACC)


def fold(
    z: Tensor,
    peak: Tensor,
    total: Tensor,
    moment: Tensor | None,
    ids: Tensor | None,
    target: Tensor | None,
    v0: int,
    *,
    columns: int | None = None,
    rows: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """`kernels.rows.fold` and the lookup of targets in one pass, in place.

    Args:
        z: logits of the columns from v0 on, any float dtype: [n, N] or, with `rows`, [T, N].
        peak, total, moment: [n] float32 or float64.
        ids, target: [n, K].
        columns: only the first ones count.
        rows: [n] int64, the rows of z that count.
        scale: multiplies the logits.
    """
    n, N = len(peak), z.shape[1] if columns is None else columns
    if n == 0:
        return
    with torch.cuda.device_of(z):
        _fold_kernel[(n,)](
            z,
            z.stride(0),
            rows,
            N,
            scale,
            peak,
            total,
            moment,
            ids,
            target,
            0 if ids is None else ids.shape[1],
            v0,
            HAS_ROWS=rows is not None,
            HAS_MOMENT=moment is not None,
            HAS_IDS=ids is not None,
            ACC=accumulator(peak),
            **block_of(N),
        )


@triton.jit
def _target_sum(g_target_ptr, base, K, zero):
    """0 - the sum of a row's K gradients by its target log-probs."""
    for k in range(K):
        zero -= tl.load(g_target_ptr + base + k)
    return zero


@triton.jit(do_not_specialize=["N", "K", "v0"])
def _logprob_grad_kernel(
    z_ptr,
    z_stride,
    out_ptr,
    out_stride,
    rows_ptr,
    N,
    scale: tl.float64,
    out_scale: tl.float64,
    shift_ptr,
    total_ptr,
    ids_ptr,
    g_target_ptr,
    K,
    v0,
    g_lse_ptr,
    g_entropy_ptr,
    entropy_ptr,
    HAS_ROWS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    z_ptr = logit_row(z_ptr, z_stride, rows_ptr, i, HAS_ROWS)
    out_ptr = logit_row(out_ptr, out_stride, rows_ptr, i, HAS_ROWS)
    scale = scalar(scale, ACC)
    out_scale = scalar(out_scale, ACC)
    shift = tl.load(shift_ptr + i)
    total = tl.load(total_ptr + i)
    base = i.to(tl.int64) * K
    of_p = _target_sum(g_target_ptr, base, K, total * 0.0)
    if HAS_LSE:
        of_p += tl.load(g_lse_ptr + i)
    g_entropy = total * 0.0
    if HAS_ENTROPY:
        g_entropy = tl.load(g_entropy_ptr + i)
        of_p -= g_entropy * (tl.load(entropy_ptr + i) - tl.log(total))
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < N
        x = tl.load(z_ptr + columns, mask=inside, other=0.0).to(ACC) * scale - shift
        dz = tl.exp(x) * (of_p / total)
        if HAS_ENTROPY:
            dz -= tl.exp(x) * tl.maximum(x, _FLOOR) * (g_entropy / total)
        for k in range(K):
            local = tl.load(ids_ptr + base + k) - v0
            if (local >= start) & (local < start + BLOCK):
                dz += tl.where(columns == local, tl.load(g_target_ptr + base + k), 0.0)
        tl.store(out_ptr + columns, (dz * out_scale).to(out_ptr.dtype.element_ty), mask=inside)


def logprob_grad(
    z: Tensor,
    out: Tensor,
    shift: Tensor,
    total: Tensor,
    ids: Tensor,
    g_target: Tensor,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    entropy: Tensor | None,
    v0: int,
    *,
    columns: int | None = None,
    rows: Tensor | None = None,
    scale: float = 1.0,
    out_scale: float = 1.0,
) -> None:
    """`kernels.rows.LogprobGrad.by_logits_` times out_scale, from z to `out`.

    out has any float dtype and may be z. The row vectors [n] and ids, g_target [n, K] are those of
    LogprobGrad; z, columns, rows and scale are as in `fold`.
    """
    n, N = len(total), z.shape[1] if columns is None else columns
    if n == 0:
        return
    with torch.cuda.device_of(z):
        _logprob_grad_kernel[(n,)](
            z,
            z.stride(0),
            out,
            out.stride(0),
            rows,
            N,
            scale,
            out_scale,
            shift,
            total,
            ids,
            g_target,
            ids.shape[1],
            v0,
            g_lse,
            g_entropy,
            entropy,
            HAS_ROWS=rows is not None,
            HAS_LSE=g_lse is not None,
            HAS_ENTROPY=g_entropy is not None,
            ACC=accumulator(total),
            **block_of(N),
        )
