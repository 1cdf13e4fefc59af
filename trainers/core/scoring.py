"""Log-probs of packed tokens through the fused head kernels."""

from __future__ import annotations

from typing import Any

import torch

import kernels


def head_options(head, temperature: float, vocab: int | None) -> dict[str, Any]:
    """The keyword arguments that describe an LM head to the kernels.

    Args:
        head: with `bias` and `softcap`.
        temperature: logits are divided by it.
        vocab: ids at and past it are padding rows. None: all rows are tokens.
    """
    return {
        "bias": head.bias,
        "logit_softcap": head.softcap,
        "temperature": temperature,
        "valid_vocab_size": vocab,
    }


def score_tokens(
    head,
    hidden: torch.Tensor,
    *,
    targets: torch.Tensor,
    temperature: float,
    vocab: int | None,
):
    """Log-probs of `targets` and of the most likely tokens, without gradients.

    Args:
        head: with `weight` [V, H], `bias` and `softcap`.
        hidden: [T, H].
        targets: [T] int64.
        temperature: logits are divided by it.
        vocab: as in `head_options`.

    Returns:
        the kernel's output, with `logprobs` and `max_logprob` [T] float32, in nats.
    """
    with torch.no_grad():
        return kernels.fused_linear_logprobs(
            hidden.detach(),
            head.weight.detach(),
            targets,
            return_max_logprob=True,
            **head_options(head, temperature, vocab),
        )
