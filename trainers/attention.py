"""Attention over packed sequences without a [T, T] mask: each sequence attends within its own bounds.

Registered with transformers as `packed`. The other implementations build a block-diagonal mask from restarting
positions (sdpa, eager, flex_attention) or use their own variable-length kernel (flash_attention_2); on a CPU
with 2,000-token rows of 60-token sequences the mask costs most of the step.
"""
from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "packed"


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
                     sequence_bounds=None, **kwargs):
    """Causal attention inside each sequence of a packed row.

    Args:
        query: [1, heads, L, d]; key, value: [1, kv_heads, L, d].
        sequence_bounds: where sequences begin, and L at the end; without it (one
            unpadded sequence) transformers' sdpa is used.
    """
    if sequence_bounds is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      **kwargs)
    lengths = [end - start for start, end in zip(sequence_bounds, sequence_bounds[1:])]
    outputs = []
    # split, not slices: its backward is one concatenation, where each slice's would fill a [T] gradient.
    for length, q, k, v in zip(lengths, *(x.split(lengths, dim=2) for x in (query, key, value))):
        mask = None
        if sliding_window is not None and length > sliding_window:
            place = torch.arange(length, device=query.device)
            distance = place[:, None] - place[None, :]
            mask = (distance >= 0) & (distance < sliding_window)
        outputs.append(scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout if module.training else 0.0, is_causal=mask is None,
            scale=scaling, enable_gqa=True))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def register() -> None:
    """Make `attn_implementation="packed"` known to transformers, which then builds no mask for it."""
    from transformers import AttentionInterface
    AttentionInterface.register(NAME, packed_attention)
