"""Avg@k and Pass@k from the correctness of n completions per prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def avg_at_k(correct: Sequence[Sequence[bool | float]]) -> float:
    """Mean correctness over prompts, each the mean over its completions, in [0, 1].

    Args:
        correct: one row per prompt, one entry per completion.

    Raises:
        ValueError: no prompts, or a prompt without completions.
    """
    if not correct or not all(len(row) for row in correct):
        raise ValueError("avg@k needs at least one prompt, and one completion for each")
    return float(np.mean([np.mean(row) for row in correct]))


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> float:
    """The chance that at least one of k completions is correct, averaged over prompts, in [0, 1].

    Of n >= k completions, c are correct: 1 - C(n-c, k) / C(n, k) is unbiased (Chen et al. 2021,
    arXiv 2107.03374). It is computed as a product, since the binomials overflow.

    Args:
        correct: one row per prompt, one entry per completion. Rows may differ in length.
        k: 1 or more.

    Raises:
        ValueError: no prompts, k below 1, or a prompt with fewer than k completions.
    """
    if not correct or k < 1:
        raise ValueError(f"pass@{k} needs at least one prompt, and k of 1 or more")
    chances: list[float] = []
    for row in correct:
        n, c = len(row), int(np.count_nonzero(row))
        if n < k:
            raise ValueError(f"pass@{k} needs {k} completions of each prompt; one has {n}")
        # The product of 1 - k/i over i = n-c+1 .. n is C(n-c, k) / C(n, k).
        factors = 1.0 - k / np.arange(n - c + 1, n + 1)
        # Fewer than k wrong ones: every choice of k holds a correct one.
        chances.append(1.0 if n - c < k else 1.0 - float(np.prod(factors)))
    return float(np.mean(chances))
