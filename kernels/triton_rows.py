"""Triton kernels for the row mathematics of kernels/rows.py: one program per row walks its logits.

A block's width depends on the row's length alone, so a row's result does not depend on the others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FLOOR = tl.constexpr(-1e4)  # kernels.rows.FLOOR


def block_of(columns: int, widest: int = 4096) -> dict:
    """The launch parameters of a kernel that walks rows of that many columns; `widest` so that
    registers suffice."""
    block = min(widest, triton.next_power_of_2(max(columns, 16)))
    return {"BLOCK": block, "num_warps": max(1, min(8, block * 8 // widest))}


def accumulator(tensor: Tensor):
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@triton.jit
def logit_row(z_ptr, stride, rows_ptr, i, HAS_ROWS: tl.constexpr):
    """Pointer to row i, or rows[i], of logits; in 64 bits, because [T, V] has more than 2^31
    elements."""
    row = i.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows_ptr + i)
    return z_ptr + row * stride


@triton.jit(do_not_specialize=["N", "K", "v0"])
def _fold_kernel(
    z_ptr,
    stride,
    rows_ptr,
    N,
    scale: tl.float64,
    m_ptr,
    l_ptr,
    q_ptr,
    ids_ptr,
    target_ptr,
    K,
    v0,
    HAS_ROWS: tl.constexpr,
    HAS_Q: tl.constexpr,
    HAS_IDS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    z_ptr = logit_row(z_ptr, stride, rows_ptr, i, HAS_ROWS)
    scale = tl.full((), scale, ACC)
    m = tl.load(m_ptr + i)
    l = tl.load(l_ptr + i)
    q = l * 0.0
    if HAS_Q:
        q = tl.load(q_ptr + i)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < N
        z = tl.load(z_ptr + columns, mask=inside, other=0.0).to(ACC) * scale
        z = tl.where(inside, z, float("-inf"))  # the tail takes no part in the softmax
        new_m = tl.maximum(m, tl.max(z, 0))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)  # -inf - -inf is NaN
        x = z - shift
        old = m - shift
        e = tl.exp(x)
        decay = tl.exp(old)
        if HAS_Q:
            q = (q + l * tl.maximum(old, _FLOOR)) * decay + tl.sum(tl.maximum(x, _FLOOR) * e, 0)
        l = l * decay + tl.sum(e, 0)
        m = new_m
    tl.store(m_ptr + i, m)
    tl.store(l_ptr + i, l)
    if HAS_Q:
        tl.store(q_ptr + i, q)
    if HAS_IDS:
        base = i.to(tl.int64) * K
        for k in range(K):
            local = tl.load(ids_ptr + base + k) - v0
            inside = (local >= 0) & (local < N)
            target = tl.load(z_ptr + local, mask=inside, other=0.0).to(ACC) * scale
            tl.store(target_ptr + base + k, target, mask=inside)


def fold(
    z: Tensor,
    m: Tensor,
    l: Tensor,
    q: Tensor | None,
    ids: Tensor | None,
    target: Tensor | None,
    v0: int,
    *,
    columns: int | None = None,
    rows: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """`kernels.rows.fold` and the lookup of targets in one pass, in place.

    z: logits of the columns v0.. , any float dtype, [n, N] or, with `rows` [n] int64, [T, N] of
    which those rows count; `columns`: only the first ones count; scale multiplies the logits; m, l,
    q [n] float32 or float64; ids, target [n, K]."""
    n, N = len(m), z.shape[1] if columns is None else columns
    if n == 0:
        return
    _fold_kernel[(n,)](
        z,
        z.stride(0),
        rows,
        N,
        scale,
        m,
        l,
        q,
        ids,
        target,
        0 if ids is None else ids.shape[1],
        v0,
        HAS_ROWS=rows is not None,
        HAS_Q=q is not None,
        HAS_IDS=ids is not None,
        ACC=accumulator(m),
        **block_of(N),
    )


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
    l_ptr,
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
    scale = tl.full((), scale, ACC)
    out_scale = tl.full((), out_scale, ACC)
    shift = tl.load(shift_ptr + i)
    l = tl.load(l_ptr + i)
    base = i.to(tl.int64) * K
    of_p = l * 0.0
    for k in range(K):
        of_p -= tl.load(g_target_ptr + base + k)
    if HAS_LSE:
        of_p += tl.load(g_lse_ptr + i)
    g_entropy = l * 0.0
    if HAS_ENTROPY:
        g_entropy = tl.load(g_entropy_ptr + i)
        of_p -= g_entropy * (tl.load(entropy_ptr + i) - tl.log(l))
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < N
        x = tl.load(z_ptr + columns, mask=inside, other=0.0).to(ACC) * scale - shift
        dz = tl.exp(x) * (of_p / l)
        if HAS_ENTROPY:
            dz -= tl.exp(x) * tl.maximum(x, _FLOOR) * (g_entropy / l)
        for k in range(K):
            local = tl.load(ids_ptr + base + k) - v0
            if (local >= start) & (local < start + BLOCK):
                dz += tl.where(columns == local, tl.load(g_target_ptr + base + k), 0.0)
        tl.store(out_ptr + columns, (dz * out_scale).to(out_ptr.dtype.element_ty), mask=inside)


def logprob_grad(
    z: Tensor,
    out: Tensor,
    shift: Tensor,
    l: Tensor,
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
    """`kernels.rows.LogprobGrad.by_logits_` times out_scale, from z to `out` (any float dtype, may
    be z).

    The row vectors [n] and ids, g_target [n, K] are those of LogprobGrad; z, columns, rows, scale
    as in `fold`."""
    n, N = len(l), z.shape[1] if columns is None else columns
    if n == 0:
        return
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
        l,
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
        ACC=accumulator(l),
        **block_of(N),
    )
