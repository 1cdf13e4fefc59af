"""Rewards of short completions."""

from __future__ import annotations

from typing import Any


def length_reward(trajectory: Any, limit: int, gamma: float) -> float:
    """accuracy + gamma accuracy (1 - tokens / limit), in [0, 1 + gamma).

    Only a correct completion gains by being short (docs/specification.md, 4).

    Args:
        trajectory: a `Trajectory` with its `score`, which is the accuracy.
        limit: the most new tokens that the completion may have.
        gamma: the weight of the length reward beside accuracy.
    """
    shortness = 1 - len(trajectory.completion_ids) / limit
    return (trajectory.score or 0.0) * (1 + gamma * shortness)
