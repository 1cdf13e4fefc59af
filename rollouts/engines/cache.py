"""A key-value cache that appends in place, for decoding with transformers."""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

SPARE = 16  # tokens that a full buffer grows by, besides a quarter of its length


def growing_cache(model_config) -> DynamicCache:
    """transformers' DynamicCache, whose unbounded layers append in place; windowed ones stay as
    they are."""
    cache = DynamicCache(config=model_config)
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class GrowingLayer(DynamicLayer):
    """Keys and values [B, heads, tokens, d] at the start of buffers with room for more.

    DynamicLayer, its specification, copies all of them for every new token.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.buffers = [key_states[..., :0, :], value_states[..., :0, :]]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new tokens; returns all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for index, states in enumerate((key_states, value_states)):
            if end > self.buffers[index].shape[-2]:
                size = (*states.shape[:-2], end + end // 4 + SPARE, states.shape[-1])
                grown = states.new_empty(size)
                grown[..., :start, :] = self.buffers[index][..., :start, :]
                self.buffers[index] = grown
            self.buffers[index][..., start:end, :] = states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        end = self.get_seq_length()
        if end > 0:
            self.buffers = [buffer[indices] for buffer in self.buffers]
            self._show(end)

    def _show(self, end: int) -> None:
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
