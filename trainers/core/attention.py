"""Attention over packed sequences without a [T, T] mask: each sequence attends within its own
bounds.

Registered with transformers as `packed`. The other implementations build a block-diagonal mask from
restarting positions (sdpa, eager, flex_attention) or use their own variable-length kernel
(flash_attention_2); on a CPU with 2,000-token rows of 60-token sequences the mask costs most of the
step.

Streaming layouts (rollouts/layout.py) come as one [L_i, L_i] mask per sequence, as one block mask
(flex_attention), or as a [L, L] mask over the packed row (the others; those that would ignore it
are refused when the model is loaded)."""

from __future__ import annotations

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
        query: [1, heads, L, d]; key, value: [1, kv_heads, L, d].
        sequence_bounds: where sequences begin, and L at the end; without it (one
            unpadded sequence) transformers' sdpa is used.
        sequence_masks: for each sequence a bool [L_i, L_i], or None where it is causal; None: all
            are.
    """
    if sequence_bounds is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    lengths = [end - start for start, end in zip(sequence_bounds, sequence_bounds[1:])]
    masks = sequence_masks or [None] * len(lengths)
    runs = equal_runs(lengths, masks)
    # split, not slices: its backward is one concatenation, where each slice's would fill a [T]
    # gradient.
    sizes = [count * length for count, length, _ in runs]
    outputs = []
    for (count, length, mask), *parts in zip(
        runs, *(x[0].split(sizes, dim=1) for x in (query, key, value))
    ):
        if sliding_window is not None and length > sliding_window:
            place = torch.arange(length, device=query.device)
            distance = place[:, None] - place[None, :]
            mask = (distance >= 0) & (distance < sliding_window)
        # [heads, count * length, d] -> [count, heads, length, d], without a copy
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)
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


def equal_runs(
    lengths: list[int], masks: list[torch.Tensor | None]
) -> list[tuple[int, int, torch.Tensor | None]]:
    """Neighbouring sequences that one call can take: (how many, their length, the mask of a single
    one).

    Causal sequences of one length go together; micro-batches are sorted by length
    (trainers/core/batching.py)."""
    runs: list[tuple[int, int, torch.Tensor | None]] = []
    for length, mask in zip(lengths, masks):
        count, last, last_mask = runs[-1] if runs else (0, None, None)
        if length == last and mask is None and last_mask is None:
            runs[-1] = (count + 1, length, None)
        else:
            runs.append((1, length, mask))
    return runs


def arguments(
    implementation: str, bounds: list[int], layouts: list[Layout] | None, like: torch.Tensor
) -> dict:
    """What a model is called with so that the sequences of a packed row attend by their layouts.

    Args:
        implementation: the model's attention.
        bounds: where sequences begin, and L.
        layouts: one per sequence, or None where all are plain.
        like: a tensor of the model's dtype and device.
    """
    packed = implementation == NAME
    if layouts is None:
        return {"sequence_bounds": bounds} if packed else {}
    tables = [torch.from_numpy(layout.table()).to(like.device) for layout in layouts]
    if packed:
        return {
            "sequence_bounds": bounds,
            "sequence_masks": [
                sees(table[:, :, None], table[:2, None, :]) if len(layout.visible) else None
                for layout, table in zip(layouts, tables)
            ],
        }
    lengths = torch.tensor([layout.length for layout in layouts], device=like.device)
    sequence = torch.arange(len(layouts), device=like.device).repeat_interleave(lengths)
    group, index, limit = (part.contiguous() for part in torch.cat(tables, 1))

    def attends(batch, head, row, column):
        return (sequence[row] == sequence[column]) & sees(
            (group[row], index[row], limit[row]), (group[column], index[column])
        )

    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return {
            "attention_mask": create_block_mask(
                attends,
                1,
                None,
                bounds[-1],
                bounds[-1],
                device=like.device,
                _compile=like.device.type == "cuda",
            )
        }
    place = torch.arange(bounds[-1], device=like.device)
    return {
        "attention_mask": additive(
            attends(0, 0, place[:, None], place[None, :])[None, None], like.dtype
        )
    }


def register() -> None:
    """Make `attn_implementation="packed"` known to transformers, which then builds no mask for
    it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
