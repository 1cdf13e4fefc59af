"""Key-value caches for decoding with transformers: a causal one, which appends in place."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

SPARE = 16  # tokens that a full buffer grows by, besides a quarter of its length


class CausalCache:
    """The keys and values of B left-padded rows, each read with a plain causal mask."""

    def __init__(self, model, rows: int):
        self.model, self.cached = model, growing_cache(model.config)
        # [B, tokens so far]: 0 for padding.
        self.attention = torch.zeros(rows, 0, dtype=torch.long, device=model.device)

    def append(self, ids: Tensor, attention: Tensor) -> Tensor:
        """Run n tokens per row and keep their keys.

        Args:
            ids: [B, n].
            attention: [B, n] int64, 0 for padding and 1 for a token.

        Returns:
            the logits [B, V] after the last of them, float32.
        """
        before = self.attention.sum(-1, keepdim=True)
        positions = before + attention.cumsum(-1) - 1
        self.attention = torch.cat([self.attention, attention], -1)
        output = self.model(
            input_ids=ids,
            attention_mask=self.attention,
            position_ids=positions.clamp(min=0),
            past_key_values=self.cached,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.cached.batch_select_indices(rows)
        self.attention = self.attention[rows]


def growing_cache(model_config) -> DynamicCache:
    """transformers' DynamicCache, whose unbounded layers append in place.

    Windowed layers stay as they are.
    """
    cache = DynamicCache(config=model_config)
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class GrowingLayer(DynamicLayer):
    """Keys and values [B, heads, tokens, d] at the start of buffers with room for more.

    DynamicLayer, its specification, copies all of them for every new token.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.buffers = [key_states[..., :0, :], value_states[..., :0, :]]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, and return all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for index, states in enumerate((key_states, value_states)):
            if end > self.buffers[index].shape[-2]:
                self.buffers[index] = self._enlarged(self.buffers[index], states, start, end)
            self.buffers[index][..., start:end, :] = states
        self._show(end)
        return self.keys, self.values

    @staticmethod
    def _enlarged(buffer: Tensor, states: Tensor, start: int, end: int) -> Tensor:
        """A buffer with room for `end` tokens and more, whose first `start` are those of before."""
        *outer, _, width = states.shape
        larger = states.new_empty(*outer, end + end // 4 + SPARE, width)
        larger[..., :start, :] = buffer[..., :start, :]
        return larger

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        end = self.get_seq_length()
        if end > 0:
            self.buffers = [buffer[indices] for buffer in self.buffers]
            self._show(end)

    def _show(self, end: int) -> None:
        """Let `keys` and `values` be views of the first `end` tokens."""
        self.keys, self.values = (buffer[..., :end, :] for buffer in self.buffers)
