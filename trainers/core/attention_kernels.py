"""The kernels of packed attention, and which of them a device, a type and a layout get.

    each    one call of torch's attention per sequence, or per run of sequences of one length
    flash   torch's flash attention for sequences of any length: a GPU, 16 bits, causal ones
    flex    torch's compiled flex_attention: a GPU, 16 bits, streaming layouts or a soft-cap

They take the same arguments and give the same numbers. `each` can do everything.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from trainers.core.packed_row import PackedRow

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
# Of flex_attention: with and without gradients, below and above 128 tokens, by window, soft-cap and
# shape of the heads, for student and teacher. Past its limit of 8 torch makes all scores instead.
COMPILATIONS = 64


def choose_kernel(
    query: torch.Tensor,
    value: torch.Tensor,
    row: PackedRow,
    dropout: float,
    softcap: float | None,
) -> str:
    """The name of the fastest kernel that computes this, a key of `KERNELS`.

    Args:
        query: [1, heads, L, d].
        value: [1, kv_heads, L, d_v].
        row: the sequences.
        dropout: of the attention weights.
        softcap: of the scores, or None.
    """
    width = query.shape[-1]
    even = value.shape[-1] == width
    # Of the three only torch's plain attention has dropout, and float32 without tf32.
    if query.device.type != "cuda" or query.dtype not in SIXTEEN_BITS or dropout:
        return "each"
    if row.layouts is None and softcap is None:
        fits = even and width % 8 == 0 and width <= 256
        return "flash" if fits and runs_flash(query.device) else "each"
    # With wider heads its backward pass asks for more shared memory than many GPUs have
    # (pytorch/pytorch#180278, #198224). Narrower ones are not implemented.
    return "flex" if even and 16 <= width <= 128 else "each"


@functools.cache
def runs_flash(device: torch.device) -> bool:
    """Whether torch's variable-length flash attention, with a scale and windows, runs there."""
    return torch.cuda.get_device_capability(device) >= (8, 0) and flash_parameters() is not None


@functools.cache
def flash_parameters() -> frozenset[str] | None:
    """The parameters of this torch's `varlen_attn`; None where it cannot do what is asked here.

    torch 2.10 has neither `scale` nor `window_size`. Before 2.12 there is no `enable_gqa`.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = frozenset(inspect.signature(varlen_attn).parameters)
    return names if {"scale", "window_size"} <= names else None


def attend_flash(query, key, value, row: PackedRow, scaling, dropout, window, softcap):
    """Causal sequences of any length in one call, of torch's flash attention.

    Arguments as of `attend_each`; without dropout, soft-cap and layouts.
    """
    from torch.nn.attention.varlen import varlen_attn

    longest = max(row.lengths)
    options: dict[str, Any] = {"scale": scaling}
    if "enable_gqa" in flash_parameters():
        options["enable_gqa"] = True
    else:
        key, value = (_repeated(x, query) for x in (key, value))
    # [1, heads, L, d] -> [L, heads, d], without a copy.
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    # It counts the tokens before the row's own; -1 is all of them.
    before = -1 if window is None else window - 1
    attended = varlen_attn(
        query,
        key,
        value,
        row.offsets,
        row.offsets,
        longest,
        longest,
        window_size=(before, 0),
        **options,
    )
    return attended[None]


def attend_flex(query, key, value, row: PackedRow, scaling, dropout, window, softcap):
    """The whole row in one call of torch's flex_attention, which skips what nothing sees.

    transformers compiles it once for all layers. Arguments as of `attend_each`; without dropout.
    """
    from transformers.integrations.flex_attention import flex_attention_forward

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, COMPILATIONS)
    module = torch.nn.Module().eval()  # it asks whether it trains, for torch 2.6
    mask = row.block_mask(window)
    attended, _ = flex_attention_forward(
        module, query, key, value, mask, scaling=scaling, softcap=softcap
    )
    return attended


def attend_each(query, key, value, row: PackedRow, scaling, dropout, window, softcap):
    """One call per run of sequences that torch's own attention can take together.

    Args:
        query: [1, heads, L, d].
        key, value: [1, kv_heads, L, d].
        row: the sequences.
        scaling: of the scores; None: 1 / sqrt(d).
        dropout: of the attention weights.
        window: a token sees this many tokens, itself included. None: all.
        softcap: of the scores; None: no bound.

    Returns:
        [1, L, heads, d].
    """
    runs = equal_runs(row.lengths, row.masks)
    # The backward of `split` is one concatenation. Each slice's would fill a [T] gradient.
    sizes = [count * length for count, length, _ in runs]
    parts = zip(*(x[0].split(sizes, dim=1) for x in (query, key, value)))
    outputs = []
    for (count, length, mask), run_parts in zip(runs, parts):
        if window is not None and length > window:
            near = _window_mask(length, window, query.device)
            mask = near if mask is None else mask & near
        # [heads, count * length, d] -> [count, heads, length, d], without a copy.
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in run_parts)
        options = {"dropout_p": dropout, "scale": scaling}
        if softcap is not None:
            attended = capped_attention(q, k, v, mask, softcap, **options)
        else:
            attended = _attend(q, k, v, mask, **options)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def _attend(query, key, value, mask, **options) -> torch.Tensor:
    """torch's attention [count, heads, L, d], causal where there is no mask."""
    # On a GPU only the flash kernel groups heads. It takes no mask and no float32, and what is left
    # then makes all scores.
    grouped = query.device.type != "cuda" or (mask is None and query.dtype in SIXTEEN_BITS)
    if not grouped:
        key, value = (_repeated(x, query) for x in (key, value))
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped, **options
    )


def _repeated(states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, kv_heads, L, d] with a head for each of the query's."""
    groups = query.shape[1] // states.shape[1]
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


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
    key, value = (_repeated(x, query) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    weights = scores.masked_fill(~mask, -torch.inf).float().softmax(-1).to(query.dtype)
    return torch.nn.functional.dropout(weights, dropout_p) @ value


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


KERNELS: dict[str, Callable] = {"each": attend_each, "flash": attend_flash, "flex": attend_flex}
