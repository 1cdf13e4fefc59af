"""Drawing one token per row from logits: temperature, top-k, top-p, and the inverse of the CDF.

B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rollouts.trajectory import Sampling

BLOCK = 128  # tokens of the vocabulary whose weights are summed before one of them is looked for


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the CDF.

    Args:
        logits: [B, V] float32.
        uniforms: [B] float64 in [0, 1).
        sampling: temperature, truncation and the vocabulary.

    Returns:
        token ids [B] int64, and their log-probs [B] in nats. Log-probs are at the temperature,
        before top-k and top-p. At temperature 0 they are at temperature 1.
    """
    logits = logits[:, : sampling.vocab]
    if sampling.missing:
        missing = torch.tensor(sampling.missing, device=logits.device)
        logits = logits.index_fill(-1, missing, -torch.inf)
    if sampling.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
        logprobs = logits.log_softmax(-1).gather(-1, tokens)
        return tokens[:, 0], logprobs[:, 0]
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    probs = logits.softmax(-1)
    weights = probs
    if sampling.top_k > 0 or sampling.top_p < 1:
        weights = truncate(probs.double(), sampling)
    tokens = invert_cdf(weights, uniforms)
    chosen = probs.gather(-1, tokens[:, None])[:, 0]
    return tokens, chosen.log()


def truncate(probs: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [B, V], with zeros outside the `top_k` largest and outside their nucleus.

    The nucleus is the smallest set of what top-k left whose mass reaches `top_p` of it.
    """
    ranked, index = torch.sort(probs, dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if sampling.top_k > 0:
        keep[:, sampling.top_k :] = False
    if sampling.top_p < 1:
        left = ranked * keep
        before = left.cumsum(-1) - left
        keep &= before < sampling.top_p * left.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, index, ranked * keep)


def invert_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The index at which the cumulative sum of each row passes its uniform share of the total.

    The search has two levels: first among the sums of blocks, then within one block. So the
    cumulative sum of a large vocabulary is never made. A block is summed in the dtype of the
    weights, everything else in float64.

    Args:
        weights: [B, V], not negative, any positive scale. A weight of zero is never chosen.
        uniforms: [B] float64 in [0, 1).

    Returns:
        [B] int64.
    """
    count, width = weights.shape
    if width % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, BLOCK - width % BLOCK))
    blocks = weights.view(count, -1, BLOCK)
    sums = blocks.sum(-1).double()
    target = uniforms * sums.sum(-1)
    block, before = crossing(sums, target)
    inside = blocks[torch.arange(count, device=weights.device), block].double()
    place, _ = crossing(inside, (target - before).clamp(min=0))
    # Weights are NaN in a run that diverged. Then any token of the vocabulary will do.
    return (block * BLOCK + place).clamp(max=width - 1)


def crossing(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cumulative sum of float64 weights [B, N] passes `target` [B].

    Returns:
        the place [B] int64, and the sum [B] of the weights before it.
    """
    cdf = weights.cumsum(-1)
    place = torch.searchsorted(cdf, target[:, None], right=True)
    # Rounding can put the target at the total: take the last place that has any weight.
    zeros_at_the_end = (weights.flip(-1) > 0).int().argmax(-1, keepdim=True)
    last = weights.shape[-1] - 1 - zeros_at_the_end
    place = torch.minimum(place, last)
    before = (cdf - weights).gather(-1, place)
    return place[:, 0], before[:, 0]
