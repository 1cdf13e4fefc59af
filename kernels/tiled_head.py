"""The tiled LM head: logits are made in [rows, columns] tiles, so that no [T, V] tensor exists.

The GEMM of a tile always has the same number of rows: the last block is padded with zero rows. The
vocabulary is cut by H alone. So a row's result does not depend on how many other rows come with it.

`active` [n] int64 holds the positions of the unmasked tokens among the T tokens of a call.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.checks import Shapes, check_number
from kernels.rows import RowStats, row_part, slices

# (logits [n, N] of some of the rows, which ones, first column, dtype) -> the gradient by them; it
# may overwrite the logits.
ByLogits = Callable[[Tensor, slice, int, torch.dtype], Tensor]


class Tiling(NamedTuple):
    """Rows and columns of a tile of logits.

    workspace: bytes of logits that a one-shot loss keeps between its forward and its gradient, over
    all its workspaces. kept: bytes of logits that a recomputing function keeps until its backward;
    it makes the others again. blocks: how many blocks of rows pass over the head together there.
    """

    rows: int
    columns: int
    workspace: int
    kept: int = 0
    blocks: int = 1


TILINGS = {
    # A CPU GEMM is slow below 128 rows, and a tile of 256 x 2048 float32 stays in the cache. The
    # logits of 2048 tokens over 151,936 ids are kept whole.
    "cpu": Tiling(256, 2048, workspace=160 * 2**20, kept=1280 * 2**20, blocks=8),
    # A tile of 1024 x 8192 float32 stays in the L2 cache of a large GPU.
    "cuda": Tiling(1024, 8192, workspace=2**30, kept=0, blocks=1),
}
# Elements of a weight tile that a CPU copies to float32: at most 8 MiB.
_WEIGHT_TILE_ELEMENTS = 2**21


class HeadInputs(NamedTuple):
    """What a public function is given of one model: hidden [T, H], weight [V, H], bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float | None

    def check(
        self,
        shapes: Shapes,
        mask: Tensor | None,
        names: tuple[str, str, str, str] = ("hidden", "lm_head_weight", "bias", "logit_softcap"),
        letters: str = "THV",
    ) -> None:
        """Check all but the temperature under their public `names`; letters: of T, H and V."""
        t, h, v = letters
        hidden_name, weight_name, bias_name, softcap_name = names
        shapes.check(hidden_name, self.hidden, t + h)
        sharded = isinstance(self.weight, Tensor) and hasattr(self.weight, "ds_shape")
        if sharded and self.weight.numel() == 0:
            raise ValueError(
                f"{weight_name} is sharded by ZeRO-3 and not gathered: call this in the forward of "
                "the module that owns it"
            )
        shapes.check(weight_name, self.weight, v + h)
        shapes.check(bias_name, self.bias, v, optional=True)
        shapes.check("mask", mask, t, "bool or uint8", optional=True)
        check_number("temperature", self.temperature)
        check_number(softcap_name, self.softcap, optional=True)

    def tiled(self, vocab: int, dtype: torch.dtype, width: int = 0) -> "TiledHead":
        """The head of the first `vocab` tokens, with logits in `dtype`.

        width: the larger hidden size where two heads must share their tiles.
        """
        on_cpu = self.weight.device.type == "cpu"
        tiling, operand = TILINGS["cpu" if on_cpu else "cuda"], dtype
        if on_cpu:
            # A CPU has no GEMM that answers in another dtype than its operands', so a weight tile
            # is copied to `dtype`.
            fitting = _WEIGHT_TILE_ELEMENTS // max(self.weight.shape[1], width, 1)
            tiling = tiling._replace(columns=max(256, min(tiling.columns, fitting)))
        elif dtype != torch.float64:
            operand = torch.promote_types(self.hidden.dtype, self.weight.dtype)
        return TiledHead(
            weight=self.weight.detach(),
            bias=None if self.bias is None else self.bias.detach(),
            temperature=float(self.temperature),
            softcap=self.softcap,
            vocab=vocab,
            dtype=dtype,
            operand=operand,
            tiling=tiling,
        )


@dataclass(frozen=True)
class TiledHead:
    """logits = softcap(hidden @ weight.T + bias) / temperature over the first `vocab` columns.

    dtype: of the logits. operand: the dtype in which a GEMM takes its factors; it always
    accumulates and answers in `dtype`.
    """

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
        """How many rows' logits a one-shot loss keeps at once: one block or two."""
        fitting = self.tiling.workspace // (4 * self.vocab * workspaces)
        whole_blocks = fitting // self.block_rows * self.block_rows
        return min(max(whole_blocks, self.block_rows), 2 * self.block_rows)

    def workspace(self, rows: int, limit: float = math.inf) -> list[Tensor]:
        """Room for the logits of up to that many rows, one [rows padded, N] tensor per tile.

        limit: in bytes; the last tiles get no room where it is less than all take.
        """
        padded = -(-rows // self.block_rows) * self.block_rows
        width = limit / (self.dtype.itemsize * max(padded, 1))
        return [
            self.weight.new_empty(padded, v1 - v0, dtype=self.dtype)
            for v0, v1 in self.tiles()
            if v1 <= width
        ]

    def weight_tile(self, tile: tuple[int, int]) -> Tensor:
        return self.weight[tile[0] : tile[1]].to(self.operand)

    def logits(self, hidden: Tensor, weight: Tensor, tile: tuple[int, int], out: Tensor) -> Tensor:
        """Logits of hidden [n, H] against the weight tile [N, H], written to out [n, N]."""
        linear = self.bias is None and self.softcap is None
        gemm(hidden, weight.t(), out, alpha=1 / self.temperature if linear else 1.0)
        if self.bias is not None:
            out.add_(self.bias[tile[0] : tile[1]])
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out if linear or self.temperature == 1 else out.div_(self.temperature)

    def softcap_slope(self, logits: Tensor) -> Tensor | None:
        """d logits / d (hidden @ weight.T) without the temperature, at given logits.

        None without a soft-cap: it is 1. tanh' = 1 - tanh^2.
        """
        if self.softcap is None:
            return None
        return (logits * (self.temperature / self.softcap)).square_().neg_().add_(1)


def gemm(a: Tensor, b: Tensor, out: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out = alpha a @ b + beta out, accumulated in out's dtype.

    out= keeps autocast from rounding the operands.
    """
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, alpha=alpha, beta=beta, out=out)
    else:
        # Half-precision operands, float32 result: no copy of the operands in float32.
        torch.addmm(out, a, b, out.dtype, alpha=alpha, beta=beta, out=out)


def needs_grad(*tensors: Tensor | None) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)


def active_rows(mask: Tensor | None, T: int, device: torch.device) -> Tensor:
    """Positions of the unmasked tokens [n].

    Masked ones never enter a GEMM, so what they hold cannot leak.
    """
    return torch.arange(T, device=device) if mask is None else mask.nonzero().squeeze(1)


def spread(values: Tensor | None, active: Tensor, T: int) -> Tensor | None:
    """[n, ...] values of the active tokens as [T, ...], zero elsewhere."""
    if values is None or len(active) == T:
        return values
    return values.new_zeros(T, *values.shape[1:]).index_copy_(0, active, values)


def spread_constants(ctx, values: list[Tensor | None], active: Tensor, T: int) -> list:
    """Several [n, ...] outputs of an autograd function as [T, ...], none differentiable."""
    outputs = [spread(x, active, T) for x in values]
    ctx.mark_non_differentiable(*(x for x in outputs if x is not None))
    return outputs


def stream_logits(
    head: TiledHead,
    hidden: Tensor,
    active: Tensor,
    stats: RowStats,
    keep: Sequence[Tensor] = (),
) -> None:
    """Feed every logit of the active rows of hidden [T, H] to `stats`.

    Those of the tiles that have a workspace in `keep` stay there as well.
    """
    block = head.block_rows
    h = torch.empty(block, hidden.shape[1], dtype=head.operand, device=hidden.device)
    for i, tile in enumerate(head.tiles()):
        weight = head.weight_tile(tile)
        kept = i < len(keep)
        z = keep[i] if kept else h.new_empty(block, tile[1] - tile[0], dtype=head.dtype)
        for at in slices(len(active), block):
            rows = active[at]
            n = len(rows)
            h[:n] = hidden.index_select(0, rows)
            h[n:] = 0
            padded = head.logits(h, weight, tile, z[at] if kept else z)
            stats.fold(slice(at.start, at.start + n), padded[:n], tile[0])


class HeadGrads:
    """Gradient accumulators of one head; None where no gradient is asked for.

    hidden [T, H] is in its own dtype; weight [V, H] and bias [V] are in the head's.
    """

    def __init__(self, head: TiledHead, hidden: Tensor, needs: tuple[bool, ...]) -> None:
        def zeros(like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=head.dtype, device=like.device)

        contiguous = torch.contiguous_format
        self.hidden = torch.zeros_like(hidden, memory_format=contiguous) if needs[0] else None
        self.weight = zeros(head.weight) if needs[1] else None
        self.bias = zeros(head.bias) if head.bias is not None and needs[2] else None

    def add_rows(
        self,
        head: TiledHead,
        hidden: Tensor,
        active: Tensor,
        by_logits: ByLogits,
        kept: Sequence[Tensor] = (),
        block: int | None = None,
    ) -> None:
        """Add the gradient of the active rows of hidden [T, H], `block` of them at a time.

        The logits are those of the workspace `kept`. Tiles that it lacks are made again.
        """
        h = hidden.index_select(0, active).to(head.operand)
        dx = None
        if self.hidden is not None:
            dx = torch.zeros(h.shape, dtype=head.dtype, device=h.device)
        block = block or max(len(h), 1)
        for i, tile in enumerate(head.tiles()):
            weight = head.weight_tile(tile)
            made = h.new_empty(block, len(weight), dtype=head.dtype) if i >= len(kept) else None
            for at in slices(len(h), block):
                part = h[at]
                if made is None:
                    z = kept[i][at][: len(part)]
                else:
                    z = head.logits(part, weight, tile, made[: len(part)])
                # Before by_logits, which may overwrite z.
                slope = head.softcap_slope(z)
                dz = by_logits(z, at, tile[0], head.operand)
                if slope is not None:
                    dz.mul_(slope)
                self._add_tile(head, part, weight, tile, dz, row_part(dx, at))
        if dx is not None:
            self.hidden.index_copy_(0, active, dx.to(self.hidden.dtype))

    def _add_tile(
        self,
        head: TiledHead,
        hidden: Tensor,
        weight: Tensor,
        tile: tuple[int, int],
        dz: Tensor,
        dx: Tensor | None,
    ) -> None:
        """One tile's part: dz [n, N] by logits, hidden and dx [n, H], weight [N, H]."""
        scale, columns = 1 / head.temperature, slice(*tile)
        if dx is not None:
            gemm(dz, weight, dx, alpha=scale, beta=1)
        if self.weight is not None:
            gemm(dz.t(), hidden, self.weight[columns], alpha=scale, beta=1)
        if self.bias is not None:
            self.bias[columns].add_(dz.sum(0, dtype=head.dtype), alpha=scale)

    def as_tuple(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


def scaled_grad(grad: Tensor | None, upstream: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """A gradient made in the forward, times the upstream scalar.

    At 1 it is handed on without a copy; on a GPU reading the scalar would stall.
    """
    if grad is None:
        return None
    if upstream.device.type == "cpu" and upstream == 1:
        return grad.to(dtype)
    return torch.mul(grad, upstream, out=torch.empty(grad.shape, dtype=dtype, device=grad.device))
