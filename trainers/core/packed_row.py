"""A packed row as attention sees it: where sequences begin, and what each of their tokens sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch

from rollouts.layout import Layout, sees


class PackedRow:
    """L tokens of sequences that lie end to end. What a kernel asks for is made once a forward.

    Args:
        bounds: where sequences begin, and L at the end.
        layouts: one per sequence; None if all are plain causal ones.
        device: of the model.
    """

    def __init__(self, bounds: list[int], layouts: list[Layout] | None, device: torch.device):
        self.bounds, self.layouts, self.device = bounds, layouts, device
        self.lengths = [end - start for start, end in pairwise(bounds)]
        self._blocks: dict[int | None, object] = {}

    @functools.cached_property
    def offsets(self) -> torch.Tensor:
        """`bounds` as int32, for kernels that take sequences of any length."""
        return torch.tensor(self.bounds, dtype=torch.int32, device=self.device)

    @functools.cached_property
    def masks(self) -> list[torch.Tensor | None]:
        """[L_i, L_i] bool for each sequence: row attends to column. None: it is causal."""
        masks: list[torch.Tensor | None] = []
        for layout in self.layouts or [None] * len(self.lengths):
            if layout is None or not len(layout.visible):
                masks.append(None)
                continue
            table = torch.from_numpy(layout.table()).to(self.device)
            masks.append(sees(table[:, :, None], table[:2, None, :]))
        return masks

    def dense(self) -> torch.Tensor:
        """[L, L] bool over the whole row."""
        place = torch.arange(self.bounds[-1], device=self.device)
        return self._rule(None)(0, 0, place[:, None], place[None, :])

    def block_mask(self, window: int | None = None):
        """The mask in the form that flex_attention takes.

        Args:
            window: a token sees this many tokens, itself included. None: all.
        """
        if window not in self._blocks:
            length = self.bounds[-1]
            self._blocks[window] = block_mask_maker(self.device.type)(
                self._rule(window), B=1, H=None, Q_LEN=length, KV_LEN=length, device=self.device
            )
        return self._blocks[window]

    def _rule(self, window: int | None) -> Callable:
        """A function (batch, head, row, column) -> bool: whether a token of the row sees one.

        It is in the form that flex_attention calls; rows and columns are places in the row.
        """
        sequence, group, index, limit = self._tables

        def attends(batch, head, row, column):
            reader = group[row], index[row], limit[row]
            same = sequence[row] == sequence[column]
            return same & sees(reader, (group[column], index[column]))

        def attends_near(batch, head, row, column):
            return attends(batch, head, row, column) & (row - column < window)

        return attends if window is None else attends_near

    @functools.cached_property
    def _tables(self) -> tuple[torch.Tensor, ...]:
        """[L] int32 each: a token's sequence, and its group, index and limit (`Layout.table`)."""
        layouts = self.layouts or [Layout(length) for length in self.lengths]
        sequence = np.repeat(np.arange(len(layouts)), self.lengths)
        table = np.concatenate([layout.table() for layout in layouts], 1)
        rows = np.concatenate([sequence[None], table]).astype(np.int32)
        return tuple(torch.from_numpy(rows).to(self.device).unbind())


@functools.cache
def block_mask_maker(device: str) -> Callable:
    """torch's create_block_mask; compiled on a GPU, where it makes no [L, L] table then."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask) if device == "cuda" else create_block_mask
