"""Attention over packed sequences without a [T, T] mask: each attends within its own bounds.

It is registered with transformers as `packed`. The other implementations build a block-diagonal
mask from restarting positions (sdpa, eager, flex_attention), or use their own variable-length
kernel (flash_attention_2). On a CPU, with 2,000-token rows of 60-token sequences, the mask costs
most of the step.

A streaming layout (rollouts/layout.py) reaches the model in one of three forms:

    packed            one [L_i, L_i] mask per sequence
    flex_attention    one block mask
    the others        one [L, L] mask over the packed row

Implementations that would ignore the last are refused when the model is loaded.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from rollouts.layout import Layout, additive, sees

NAME = "packed"


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    sequence_bounds=None,
    sequence_masks=None,
    **kwargs,
):
    """Attention inside each sequence of a packed row, causal or by its mask.

    Args:
        module: the attention layer, which is training or not.
        query: [1, heads, L, d].
        key, value: [1, kv_heads, L, d].
        attention_mask: used without `sequence_bounds` alone.
        scaling: of the scores; None: 1 / sqrt(d).
        dropout: of the attention weights, in training.
        sliding_window: a token sees this many tokens, itself included. None: all.
        sequence_bounds: where sequences begin, and L at the end. Without it the row is one unpadded
            sequence, and transformers' sdpa is used.
        sequence_masks: for each sequence a bool [L_i, L_i], or None where it is causal. None: all
            are.

    Returns:
        ([1, L, heads, d], None); the weights are not made.
    """
    if sequence_bounds is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    lengths = [end - start for start, end in pairwise(sequence_bounds)]
    runs = equal_runs(lengths, sequence_masks or [None] * len(lengths))
    # The backward of `split` is one concatenation. Each slice's would fill a [T] gradient.
    sizes = [count * length for count, length, _ in runs]
    parts = zip(*(x[0].split(sizes, dim=1) for x in (query, key, value)))
    outputs = []
    for (count, length, mask), run_parts in zip(runs, parts):
        if sliding_window is not None and length > sliding_window:
            mask = _window_mask(length, sliding_window, query.device)
        # [heads, count * length, d] -> [count, heads, length, d], without a copy.
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in run_parts)
        attended = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout if module.training else 0.0,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """[length, length] bool: each token sees itself and the window - 1 tokens before it."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < window)


def equal_runs(
    lengths: list[int], masks: list[torch.Tensor | None]
) -> list[tuple[int, int, torch.Tensor | None]]:
    """Neighbouring sequences that one call can take.

    Causal sequences of one length go together. Micro-batches are sorted by length
    (trainers/core/batching.py).

    Args:
        lengths: of the sequences, in tokens.
        masks: theirs, bool [L_i, L_i], or None where a sequence is causal.

    Returns:
        (how many sequences, their length, the mask of a single one) for each call.
    """
    runs: list[tuple[int, int, torch.Tensor | None]] = []
    for length, mask in zip(lengths, masks):
        count, last_length, last_mask = runs[-1] if runs else (0, None, None)
        if length == last_length and mask is None and last_mask is None:
            runs[-1] = (count + 1, length, None)
        else:
            runs.append((1, length, mask))
    return runs


def arguments(
    implementation: str, bounds: list[int], layouts: list[Layout] | None, like: torch.Tensor
) -> dict[str, Any]:
    """What a model is called with so that packed sequences attend by their layouts.

    Args:
        implementation: the model's attention.
        bounds: where sequences begin, and L.
        layouts: one per sequence, or None where all are plain.
        like: a tensor of the model's dtype and device.
    """
    packed = implementation == NAME
    if layouts is None:
        return {"sequence_bounds": bounds} if packed else {}
    # Each table is [3, L_i]: a token's group, its index and the limit of what it sees.
    tables = [torch.from_numpy(layout.table()).to(like.device) for layout in layouts]
    if packed:
        masks = [
            sees(table[:, :, None], table[:2, None, :]) if len(layout.visible) else None
            for layout, table in zip(layouts, tables)
        ]
        return {"sequence_bounds": bounds, "sequence_masks": masks}
    attends = _row_mask(layouts, tables)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        mask = create_block_mask(
            attends,
            B=1,
            H=None,
            Q_LEN=bounds[-1],
            KV_LEN=bounds[-1],
            device=like.device,
            _compile=like.device.type == "cuda",
        )
        return {"attention_mask": mask}
    place = torch.arange(bounds[-1], device=like.device)
    mask = attends(0, 0, place[:, None], place[None, :])
    return {"attention_mask": additive(mask[None, None], like.dtype)}


def _row_mask(layouts: list[Layout], tables: list[torch.Tensor]):
    """A function (batch, head, row, column) -> bool: whether a token of the packed row sees one.

    It is in the form that flex_attention calls; rows and columns are places in the packed row.
    """
    device = tables[0].device
    lengths = torch.tensor([layout.length for layout in layouts], device=device)
    sequence = torch.arange(len(layouts), device=device).repeat_interleave(lengths)
    group, index, limit = (part.contiguous() for part in torch.cat(tables, 1))

    def attends(batch, head, row, column):
        reader = group[row], index[row], limit[row]
        same = sequence[row] == sequence[column]
        return same & sees(reader, (group[column], index[column]))

    return attends


def register() -> None:
    """Make `attn_implementation="packed"` known to transformers, which builds no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
