"""Read schedules: how much of a source has been read when each word of its target is written
(methods.md, 5)."""

from __future__ import annotations

import numpy as np

# Weights of the L + 1 places D_0 … D_L among which the reading is spread; D_0 and D_1 both come
# before the first word.
WEIGHTS = {
    "uniform": np.ones_like,
    "early": lambda place: place[::-1] + 1.0,
    "late": lambda place: place + 1.0,
    "diagonal": np.ones_like,
}


def draw_schedule(rng: np.random.Generator, units: int, words: int, kind: str) -> np.ndarray:
    """phi(1) … phi(L): 1 to M, not decreasing, M at the end.

    phi(t) = D_0 + … + D_t, where D_0 is 1 more than its part of M - 1 units that are spread over L
    + 1 places by a multinomial (arXiv 2606.00523). Our choices: the first unit is always read,
    since nothing is written before; the weights, equal (`uniform`), falling or rising linearly
    (`early`, `late`); and `diagonal`, equal weights with the least variance (one random offset for
    all places), which stays within a unit of the diagonal.

    Args:
        units: M, of the source.
        words: L, of the target, its end counted as one.
        kind: a key of `WEIGHTS`.

    Returns:
        [L] int64.
    """
    if units < 1 or words < 1:
        raise ValueError(f"no schedule reads {units} units for {words} words")
    weights = WEIGHTS[kind](np.arange(words + 1, dtype=float))
    weights /= weights.sum()
    if kind == "diagonal":
        reached = np.floor(np.cumsum(weights) * (units - 1) + rng.random() * (1 - 1e-9)).astype(
            np.int64
        )
    else:
        reached = np.cumsum(rng.multinomial(units - 1, weights))
    return np.minimum(1 + reached[1:], units)
