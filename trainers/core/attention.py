"""Attention over packed sequences without a [T, T] mask: each attends within its own bounds.

It is registered with transformers as `packed`. Device, type and layout choose its kernel
(trainers/core/attention_kernels.py).

The other implementations build a block-diagonal mask from restarting positions (sdpa, eager,
flex_attention), or use their own variable-length kernel (flash_attention_2). On a CPU, with
2,000-token rows of 60-token sequences, the mask costs most of the step.

A streaming layout (rollouts/layout.py) reaches the other implementations as one block mask
(flex_attention), or as one [L, L] mask over the packed row. Implementations that would ignore the
last are refused when the model is loaded.

What a model asks of its attention and `packed` does not know is an error, never dropped.
"""

from __future__ import annotations

from typing import Any

import torch

from recipes.errors import ModelError
from rollouts.layout import Layout, additive
from trainers.core.attention_kernels import KERNELS, choose_kernel
from trainers.core.packed_row import PackedRow

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
    packed_row: PackedRow | None = None,
    softcap=None,
    **kwargs,
):
    """Attention inside each sequence of a packed row, causal or by its layout.

    Args:
        module: the attention layer, which is training or not.
        query: [1, heads, L, d].
        key, value: [1, kv_heads, L, d].
        attention_mask: used without `packed_row` alone.
        scaling: of the scores; None: 1 / sqrt(d).
        dropout: of the attention weights, in training.
        sliding_window: a token sees this many tokens, itself included. None: all.
        packed_row: the sequences. Without it the row is one unpadded sequence, and transformers'
            sdpa is used.
        softcap: scores become softcap * tanh(score / softcap), as Gemma 2's do. None: no bound.

    Returns:
        ([1, L, heads, d], None); the weights are not made.

    Raises:
        ModelError: the model passes something else that is not None, such as attention sinks. Or
            the layer has a window by its config, and passes none.
    """
    if packed_row is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        _refuse(module, {"softcap": softcap, "s_aux": kwargs.get("s_aux")})
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse(module, {name: kwargs[name] for name in kwargs.keys() - WITHOUT_EFFECT})
    _check_window(module, sliding_window)
    dropout = dropout if module.training else 0.0
    query, key, value = _as_computed(query, key, value)
    kernel = KERNELS[choose_kernel(query, value, packed_row, dropout, softcap)]
    attended = kernel(
        query,
        key,
        value,
        packed_row,
        scaling=scaling,
        dropout=dropout,
        window=sliding_window,
        softcap=softcap,
    )
    return attended, None


def _as_computed(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value in autocast's type on a GPU, as torch's own attention casts them."""
    kind = states[0].device.type
    if kind == "cuda" and torch.is_autocast_enabled(kind):
        return tuple(x.to(torch.get_autocast_dtype(kind)) for x in states)
    return states


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
    row = PackedRow(bounds, layouts, like.device)
    if implementation == NAME:
        return {"packed_row": row}
    if layouts is None:
        return {}
    if implementation == "flex_attention":
        return {"attention_mask": row.block_mask()}
    return {"attention_mask": additive(row.dense()[None, None], like.dtype)}


def casts(implementation: str, states: torch.Tensor) -> list[bool]:
    """Whether a model is checked as it is, or cast to 16 bits, or both.

    Weights that learn are loaded in 32 bits and cast later. In 16 bits a GPU has other kernels.

    Args:
        implementation: the model's attention.
        states: hidden states of the model.
    """
    if states.dtype != torch.float32:
        return [False]
    if implementation.startswith("flash"):
        return [True]
    return [False, True] if implementation == NAME and states.is_cuda else [False]


def register() -> None:
    """Make `attn_implementation="packed"` known to transformers, which builds no mask for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
