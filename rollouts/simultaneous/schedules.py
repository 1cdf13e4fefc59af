"""Read schedules: how much of a source is read when each word of its target is written.

docs/specification.md, 5.2.
"""

from __future__ import annotations

import numpy as np

# Weights of the L + 1 places D_0 … D_L among which the reading is spread. D_0 and D_1 both come
# before the first word.
WEIGHTS = {
    "uniform": np.ones_like,
    "early": lambda place: place[::-1] + 1.0,
    "late": lambda place: place + 1.0,
    "diagonal": np.ones_like,
}


def draw_schedule(rng: np.random.Generator, units: int, words: int, kind: str) -> np.ndarray:
    """phi(1) … phi(L): 1 to M, not decreasing, M at the end.

    phi(t) = 1 + D_0 + … + D_t. A multinomial spreads M - 1 units over the L + 1 places D_0 … D_L
    (arXiv 2606.00523). The first unit is always read, since nothing is written before it [choice].

    Args:
        rng: the source of randomness.
        units: M, of the source.
        words: L, of the target, its end counted as one.
        kind: a key of `WEIGHTS` [choice]. The weights are equal (`uniform`), or fall or rise
            linearly (`early`, `late`). `diagonal` has equal weights with the least variance: one
            random offset for all places. It stays within a unit of the diagonal.

    Returns:
        [L] int64.
    """
    if units < 1 or words < 1:
        raise ValueError(f"no schedule reads {units} units for {words} words")
    weights = WEIGHTS[kind](np.arange(words + 1, dtype=float))
    weights /= weights.sum()
    if kind == "diagonal":
        offset = rng.random() * (1 - 1e-9)
        units_read = np.floor(np.cumsum(weights) * (units - 1) + offset).astype(np.int64)
    else:
        units_read = np.cumsum(rng.multinomial(units - 1, weights))
    return np.minimum(1 + units_read[1:], units)
