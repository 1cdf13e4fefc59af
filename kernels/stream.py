"""The LM head, streamed: logits are made in [rows, columns] tiles, so that no [T, V] tensor exists.

The GEMM of a tile always has the same number of rows (the last block is padded with zero rows) and the
vocabulary is cut by H alone, so that a row's result does not depend on how many other rows come with it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rows import RowStats

# Bytes of logits that a one-shot loss keeps between its forward and its gradient, over all its workspaces.
WORKSPACE_BYTES = 160 * 2**20


@dataclass(frozen=True)
class LinearHead:
    """logits = softcap(hidden @ weight.T + bias) / temperature over the first `vocab` columns, in `dtype`."""

    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None
    vocab: int
    dtype: torch.dtype
    columns: int

    @property
    def block_rows(self) -> int:
        # A CPU tile of 64 x 2048 float32 stays in the cache; a GPU wants fewer, larger GEMMs.
        return 64 if self.weight.device.type == "cpu" else 1024

    def tiles(self) -> list[tuple[int, int]]:
        """Column ranges [v0, v1)."""
        return [(v, min(v + self.columns, self.vocab)) for v in range(0, self.vocab, self.columns)]

    def chunk_rows(self, workspaces: int) -> int:
        """How many rows' logits a one-shot loss keeps at once."""
        rows = WORKSPACE_BYTES // (4 * self.vocab * workspaces) // self.block_rows * self.block_rows
        return min(max(rows, self.block_rows), 4 * self.block_rows)

    def workspace(self, rows: int) -> list[Tensor]:
        """Room for the logits of up to that many rows, one [rows_padded, N] tensor per tile."""
        padded = -(-rows // self.block_rows) * self.block_rows
        return [self.weight.new_empty(padded, v1 - v0, dtype=self.dtype) for v0, v1 in self.tiles()]

    def weight_tile(self, tile: tuple[int, int]) -> Tensor:
        return self.weight[tile[0]:tile[1]].to(self.dtype)

    def logits(self, h: Tensor, w: Tensor, tile: tuple[int, int], out: Tensor) -> Tensor:
        """Logits of rows h [n, H] against the weight tile w [N, H], written to out [n, N]."""
        torch.mm(h, w.t(), out=out)  # out= also keeps autocast from rounding the operands
        if self.bias is not None:
            out.add_(self.bias[tile[0]:tile[1]])
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1:
            out.div_(self.temperature)
        return out

    def slope(self, z: Tensor) -> Tensor | float | None:
        """d logits / d (hidden @ weight.T) at logits z; None where it is 1."""
        if self.softcap is None:
            return None if self.temperature == 1 else 1 / self.temperature
        return (z * (self.temperature / self.softcap)).square_().neg_().add_(1).div_(self.temperature)


def make_head(dtype: torch.dtype, weight: Tensor, bias: Tensor | None, temperature: float,
              softcap: float | None, vocab: int, width: int = 0) -> LinearHead:
    """`width`: the larger hidden size where two heads must share their tiles."""
    # On the CPU a float32 weight tile takes at most 8 MiB.
    wide = 2048 if weight.device.type == "cpu" else 32768
    columns = max(256, min(wide, wide * 1024 // max(weight.shape[1], width, 1)))
    bias = None if bias is None else bias.detach()
    return LinearHead(weight.detach(), bias, float(temperature), softcap, vocab, dtype, columns)


def needs_grad(*tensors: Tensor | None) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)


def active_rows(mask: Tensor | None, T: int, device: torch.device) -> Tensor:
    """Indices of the unmasked rows: masked ones never enter a GEMM, so what they hold cannot leak."""
    return torch.arange(T, device=device) if mask is None else mask.nonzero().squeeze(1)


def spread(values: Tensor | None, rows: Tensor, T: int) -> Tensor | None:
    """[n, ...] values of the active rows as [T, ...], zero elsewhere."""
    if values is None or len(rows) == T:
        return values
    return values.new_zeros(T, *values.shape[1:]).index_copy_(0, rows, values)


def pad_rows(values: Tensor, multiple: int) -> Tensor:
    """values [n, K] with zero rows appended up to a multiple."""
    extra = -len(values) % multiple
    return torch.cat([values, values.new_zeros(extra, *values.shape[1:])]) if extra else values


def stream_logits(head: LinearHead, hidden: Tensor, rows: Tensor, stats: RowStats,
                  keep: list[Tensor] | None = None) -> None:
    """Feed every logit of the given rows to `stats`; with a workspace `keep`, leave them there as well."""
    block, n = head.block_rows, len(rows)
    h = torch.empty(block, hidden.shape[1], dtype=head.dtype, device=hidden.device)
    for i, tile in enumerate(head.tiles()):
        w = head.weight_tile(tile)
        z = h.new_empty(block, tile[1] - tile[0]) if keep is None else keep[i]
        for start in range(0, n, block):
            some = rows[start:start + block]
            h[:len(some)] = hidden.index_select(0, some)
            h[len(some):] = 0
            part = head.logits(h, w, tile, z if keep is None else z[start:start + block])
            stats.fold(slice(start, start + block), part, tile[0])


class HeadGrads:
    """Gradient accumulators of one head in its accumulation dtype; None where no gradient is asked for."""

    def __init__(self, head: LinearHead, hidden: Tensor, needs: tuple[bool, bool, bool]) -> None:
        def zeros(like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=head.dtype, device=like.device)
        self.hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.weight = zeros(head.weight) if needs[1] else None
        self.bias = zeros(head.bias) if head.bias is not None and needs[2] else None

    def add_rows(self, head: LinearHead, hidden: Tensor, rows: Tensor,
                 by_logits: Callable[[Tensor, int], Tensor], kept: list[Tensor] | None = None) -> None:
        """Add the gradient of some rows.

        `by_logits(z, v0)` overwrites the logits z [n, N] of the columns from v0 by the gradient. The logits
        are those of the workspace `kept`; without one they are made again.
        """
        h = hidden.index_select(0, rows).to(head.dtype)
        dx = torch.zeros_like(h) if self.hidden is not None else None
        for i, tile in enumerate(head.tiles()):
            w = head.weight_tile(tile)
            z = head.logits(h, w, tile, h.new_empty(len(h), len(w))) if kept is None else kept[i][:len(h)]
            slope = head.slope(z)
            dz = by_logits(z, tile[0])
            if slope is not None:
                dz.mul_(slope)
            if dx is not None:
                dx.addmm_(dz, w)
            if self.weight is not None:
                self.weight[tile[0]:tile[1]].addmm_(dz.t(), h)
            if self.bias is not None:
                self.bias[tile[0]:tile[1]].add_(dz.sum(0))
        if dx is not None:
            self.hidden.index_copy_(0, rows, dx.to(self.hidden.dtype))

    def as_tuple(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


def scaled_grad(grad: Tensor | None, upstream: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """A gradient made in the forward, times the upstream scalar; at 1 it is handed on without a copy."""
    if grad is None:
        return None
    if upstream.device.type == "cpu" and upstream == 1:  # reading the value on a GPU would stall it
        return grad.to(dtype)
    return (grad * upstream).to(dtype)
