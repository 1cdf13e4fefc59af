"""The LM head, streamed: logits are made in [rows, columns] tiles, so that no [T, V] tensor exists.

The GEMM of a tile always has the same number of rows (the last block is padded with zero rows) and
the vocabulary is cut by H alone, so that a row's result does not depend on how many other rows come
with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.rows import RowStats


class Tiling(NamedTuple):
    """Rows and columns of a tile of logits; `workspace`: bytes of logits that a one-shot loss keeps
    between its forward and its gradient, over all its workspaces."""

    rows: int
    columns: int
    workspace: int


TILINGS = {
    # A CPU GEMM is slow below 128 rows, and a tile of 256 x 2048 float32 stays in the cache.
    "cpu": Tiling(256, 2048, 160 * 2**20),
    # A tile of 1024 x 8192 float32 stays in the L2 cache of a large GPU.
    "cuda": Tiling(1024, 8192, 2**30),
}


@dataclass(frozen=True)
class LinearHead:
    """logits = softcap(hidden @ weight.T + bias) / temperature over the first `vocab` columns, in
    `dtype`.

    `operand`: the dtype in which a GEMM takes its factors; it always accumulates and answers in
    `dtype`."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None
    vocab: int
    dtype: torch.dtype
    operand: torch.dtype
    tiling: Tiling

    @property
    def block_rows(self) -> int:
        return self.tiling.rows

    @property
    def columns(self) -> int:
        return self.tiling.columns

    def tiles(self) -> list[tuple[int, int]]:
        """Column ranges [v0, v1)."""
        return [(v, min(v + self.columns, self.vocab)) for v in range(0, self.vocab, self.columns)]

    def chunk_rows(self, workspaces: int) -> int:
        """How many rows' logits a one-shot loss keeps at once."""
        rows = (
            self.tiling.workspace
            // (4 * self.vocab * workspaces)
            // self.block_rows
            * self.block_rows
        )
        return min(max(rows, self.block_rows), 2 * self.block_rows)

    def workspace(self, rows: int) -> list[Tensor]:
        """Room for the logits of up to that many rows, one [rows_padded, N] tensor per tile."""
        padded = -(-rows // self.block_rows) * self.block_rows
        return [self.weight.new_empty(padded, v1 - v0, dtype=self.dtype) for v0, v1 in self.tiles()]

    def weight_tile(self, tile: tuple[int, int]) -> Tensor:
        return self.weight[tile[0] : tile[1]].to(self.operand)

    def logits(self, h: Tensor, w: Tensor, tile: tuple[int, int], out: Tensor) -> Tensor:
        """Logits of rows h [n, H] against the weight tile w [N, H], written to out [n, N]."""
        linear = self.bias is None and self.softcap is None
        gemm(h, w.t(), out, alpha=1 / self.temperature if linear else 1.0)
        if self.bias is not None:
            out.add_(self.bias[tile[0] : tile[1]])
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out if linear or self.temperature == 1 else out.div_(self.temperature)

    def slope(self, z: Tensor) -> Tensor | None:
        """What the soft-cap adds to d logits / d (hidden @ weight.T) = slope / temperature at
        logits z."""
        return (
            None
            if self.softcap is None
            else (z * (self.temperature / self.softcap)).square_().neg_().add_(1)
        )


def gemm(a: Tensor, b: Tensor, out: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out = alpha a @ b + beta out, accumulated in out's dtype; out= keeps autocast from rounding
    the operands."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
    else:  # half-precision operands, float32 result: no copy of the operands in float32
        torch.addmm(out, a, b, out.dtype, alpha=alpha, beta=beta, out=out)


def make_head(
    dtype: torch.dtype,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab: int,
    width: int = 0,
) -> LinearHead:
    """`width`: the larger hidden size where two heads must share their tiles."""
    tiling, operand = TILINGS["cpu" if weight.device.type == "cpu" else "cuda"], dtype
    if weight.device.type == "cpu":  # a float32 copy of a weight tile takes at most 8 MiB
        tiling = tiling._replace(
            columns=max(256, min(tiling.columns, 2**21 // max(weight.shape[1], width, 1)))
        )
    # a CPU has no GEMM that answers in another dtype than it is asked in
    elif dtype != torch.float64:
        operand = torch.promote_types(hidden.dtype, weight.dtype)
    bias = None if bias is None else bias.detach()
    return LinearHead(
        weight.detach(), bias, float(temperature), softcap, vocab, dtype, operand, tiling
    )


def needs_grad(*tensors: Tensor | None) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)


def active_rows(mask: Tensor | None, T: int, device: torch.device) -> Tensor:
    """Indices of the unmasked rows: masked ones never enter a GEMM, so what they hold cannot
    leak."""
    return torch.arange(T, device=device) if mask is None else mask.nonzero().squeeze(1)


def spread(values: Tensor | None, rows: Tensor, T: int) -> Tensor | None:
    """[n, ...] values of the active rows as [T, ...], zero elsewhere."""
    if values is None or len(rows) == T:
        return values
    return values.new_zeros(T, *values.shape[1:]).index_copy_(0, rows, values)


def stream_logits(
    head: LinearHead,
    hidden: Tensor,
    rows: Tensor,
    stats: RowStats,
    keep: list[Tensor] | None = None,
) -> None:
    """Feed every logit of the given rows to `stats`; with a workspace `keep`, leave them there as
    well."""
    block, n = head.block_rows, len(rows)
    h = torch.empty(block, hidden.shape[1], dtype=head.operand, device=hidden.device)
    for i, tile in enumerate(head.tiles()):
        w = head.weight_tile(tile)
        z = h.new_empty(block, tile[1] - tile[0], dtype=head.dtype) if keep is None else keep[i]
        for start in range(0, n, block):
            some = rows[start : start + block]
            h[: len(some)] = hidden.index_select(0, some)
            h[len(some) :] = 0
            part = head.logits(h, w, tile, z if keep is None else z[start : start + block])
            stats.fold(slice(start, start + len(some)), part[: len(some)], tile[0])


class HeadGrads:
    """Gradient accumulators of one head in its accumulation dtype; None where no gradient is asked
    for."""

    def __init__(self, head: LinearHead, hidden: Tensor, needs: tuple[bool, bool, bool]) -> None:
        def zeros(like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=head.dtype, device=like.device)

        self.hidden = (
            torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        )
        self.weight = zeros(head.weight) if needs[1] else None
        self.bias = zeros(head.bias) if head.bias is not None and needs[2] else None

    def add_rows(
        self,
        head: LinearHead,
        hidden: Tensor,
        rows: Tensor,
        by_logits: Callable[[Tensor, int, torch.dtype], Tensor],
        kept: list[Tensor] | None = None,
    ) -> None:
        """Add the gradient of some rows.

        `by_logits(z, v0, dtype)` gives the gradient by the logits z [n, N] of the columns from v0
        and may overwrite them. The logits are those of the workspace `kept`; without one they are
        made again."""
        h = hidden.index_select(0, rows).to(head.operand)
        dx = (
            torch.zeros(h.shape, dtype=head.dtype, device=h.device)
            if self.hidden is not None
            else None
        )
        scale = 1 / head.temperature
        for i, tile in enumerate(head.tiles()):
            w = head.weight_tile(tile)
            z = (
                head.logits(h, w, tile, h.new_empty(len(h), len(w), dtype=head.dtype))
                if kept is None
                else kept[i][: len(h)]
            )
            slope = head.slope(z)
            dz = by_logits(z, tile[0], head.operand)
            if slope is not None:
                dz.mul_(slope)
            if dx is not None:
                gemm(dz, w, dx, alpha=scale, beta=1)
            if self.weight is not None:
                gemm(dz.t(), h, self.weight[tile[0] : tile[1]], alpha=scale, beta=1)
            if self.bias is not None:
                self.bias[tile[0] : tile[1]].add_(dz.sum(0, dtype=head.dtype), alpha=scale)
        if dx is not None:
            self.hidden.index_copy_(0, rows, dx.to(self.hidden.dtype))

    def as_tuple(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


def scaled_grad(grad: Tensor | None, upstream: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """A gradient made in the forward, times the upstream scalar; at 1 it is handed on without a
    copy."""
    if grad is None:
        return None
    if upstream.device.type == "cpu" and upstream == 1:  # reading the value on a GPU would stall it
        return grad.to(dtype)
    return torch.mul(grad, upstream, out=torch.empty(grad.shape, dtype=dtype, device=grad.device))
