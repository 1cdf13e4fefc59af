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

What a model asks of its attention and `packed` does not know is an error, never dropped.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from recipes.errors import ModelError
from rollouts.layout import Layout, additive, sees

NAME = "packed"
FULL = "full_attention"
# What models pass on that changes nothing here: the keys already have their positions.
WITHOUT_EFFECT = {"position_ids", "cache_position", "use_cache", "output_router_logits"}


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
    softcap=None,
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
        softcap: scores become softcap * tanh(score / softcap), as Gemma 2's do. None: no bound.

    Returns:
        ([1, L, heads, d], None); the weights are not made.

    Raises:
        ModelError: the model passes something else that is not None, such as attention sinks. Or
            the layer has a window by its config, and passes none.
    """
    if sequence_bounds is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        _refuse(module, {"softcap": softcap, "s_aux": kwargs.get("s_aux")})
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse(module, {name: kwargs[name] for name in kwargs.keys() - WITHOUT_EFFECT})
    _check_window(module, sliding_window)
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
        options = {"dropout_p": dropout if module.training else 0.0, "scale": scaling}
        if softcap is not None:
            attended = capped_attention(q, k, v, mask, softcap, **options)
        else:
            attended = scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True, **options
            )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def capped_attention(query, key, value, mask, softcap, dropout_p=0.0, scale=None) -> torch.Tensor:
    """Attention with bounded scores, which torch's own cannot compute.

    The scores are made as a whole.

    Args:
        query: [count, heads, L, d].
        key, value: [count, kv_heads, L, d].
        mask: bool [L, L]; None: causal.
        softcap: scores become softcap * tanh(score / softcap).
        dropout_p: of the attention weights.
        scale: of the scores; None: 1 / sqrt(d).

    Returns:
        [count, heads, L, d].
    """
    length, width = query.shape[-2:]
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    weights = scores.masked_fill(~mask, -torch.inf).float().softmax(-1).to(query.dtype)
    return torch.nn.functional.dropout(weights, dropout_p) @ value


def _refuse(module, arguments: dict[str, Any]) -> None:
    """Raises ModelError: the attention layer passes one of these arguments."""
    if given := sorted(name for name, value in arguments.items() if value is not None):
        raise ModelError(
            f"{type(module).__name__} passes {given[0]} to its attention, which "
            f"model.attn_implementation={NAME} does not know; try eager"
        )


def _check_window(module, window: int | None) -> None:
    """Raises ModelError: a layer has a window by its config, but does not say so in its call.

    Its model puts the window into a mask, which is not made here.
    """
    config = getattr(module, "config", None)
    layers, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if layers is not None and layer is not None:
        kind = layers[layer]
    else:
        kind = "sliding_attention" if getattr(config, "sliding_window", None) else FULL
    if window is None and kind != FULL:
        raise ModelError(
            f"{type(module).__name__} has {kind} that model.attn_implementation={NAME} is not told "
            "of; try sdpa"
        )


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
