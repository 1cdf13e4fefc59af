"""The advantage of a completion over the others of its prompt, its group."""

from __future__ import annotations

import numpy as np

# Added to a group's standard deviation.
EPSILON = 1e-6


def group_advantages(rewards: np.ndarray, normalize_std: bool = True) -> np.ndarray:
    """Rewards less their group's mean (GRPO, arXiv 2402.03300).

    Args:
        rewards: [P, n], a row per prompt.
        normalize_std: divides by the group's standard deviation (of the population) plus 1e-6.

    Returns:
        [P, n]; exactly 0 in a group of one, or of equal rewards.
    """
    advantages = rewards - rewards.mean(1, keepdims=True)
    if normalize_std:
        advantages = advantages / (rewards.std(1, keepdims=True) + EPSILON)
    # Rounding leaves equal rewards a difference to their mean, which the division would blow up.
    differs = np.ptp(rewards, axis=1, keepdims=True) > 0
    return np.where(differs, advantages, 0.0)


def equal_groups_share(rewards: np.ndarray) -> float:
    """The share of groups [P, n] whose rewards are all equal, so that none has an advantage."""
    return float((np.ptp(rewards, axis=1) == 0).mean())
