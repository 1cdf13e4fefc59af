"""Numbers of a report: read from JSON, written in a few digits, thinned for a curve."""

from __future__ import annotations

import math
import re

import numpy as np

LARGEST = 1e300  # what is larger counts as infinite
SUFFIXES = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


def number(value) -> float | None:
    """A finite float. A gap (null, NaN, infinite) is NaN; what is no number is None."""
    if value is None or value in ("NaN", "Infinity", "-Infinity"):
        return math.nan
    if not isinstance(value, (int, float)):
        return None
    # Compared before the conversion: float() of an int of 400 digits raises.
    return float(value) if abs(value) < LARGEST else math.nan


def numbers(values) -> np.ndarray:
    """A list as floats [N], NaN for what is no number. What is no list is empty."""
    if not isinstance(values, list):
        return np.array([])
    found = [number(value) for value in values]
    return np.array([math.nan if value is None else value for value in found], float)


def finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def short(value, unit: str = "", digits: int = 3) -> str:
    """A number in a few significant digits, with its unit after it.

    The unit `%` is for a share in 0..1. What is no number is returned as its text.
    """
    size = number(value)
    if size is None:
        return str(value)
    if math.isnan(size):
        return "–"
    if unit == "%":
        return f"{100 * size:.1f}%".replace("-", "−")
    # From 10,000 on: a step or a length of four digits is easier to read whole.
    scale, suffix = next((pair for pair in SUFFIXES if abs(size) >= 10 * pair[0]), (1, ""))
    size /= scale
    # `g` would write 1234 in three digits as 1.23e+03.
    text = f"{size:.0f}" if abs(size) >= 10 ** (digits - 1) else f"{size:.{digits}g}"
    text = re.sub(r"e([-+])0*", r"e\1", text).replace("-", "−")
    return f"{text}{suffix} {unit}".strip()


def smoothed(values: np.ndarray, log: bool = False) -> np.ndarray:
    """Centred moving average of values [N] over a 25th of them; gaps stay gaps.

    On a log axis the average is that of the logarithms, so that it runs through the middle of what
    is seen.
    """
    known = np.isfinite(values)
    measured = np.where(known, values, 1.0)
    if log:
        measured = np.log(measured)
    window = np.ones(2 * (len(values) // 50) + 1)
    total = np.convolve(measured * known, window, "same")
    count = np.convolve(known, window, "same")
    mean = total / np.maximum(count, 1)
    if log:
        mean = np.exp(mean)
    return np.where(known, mean, math.nan)


def thinned(values: np.ndarray, bins: int = 300) -> np.ndarray:
    """Indices of at most about 2 × bins of the values [N], in order.

    Of every bin they are those of the lowest and of the highest value, so that a spike stays. A bin
    with a gap keeps the gap. A short series is kept whole.
    """
    size = max(1, len(values) // bins)
    kept = set()
    for start in range(0, len(values), size):
        part = values[start : start + size]
        # Both return the first NaN where there is one.
        kept |= {start + int(np.argmin(part)), start + int(np.argmax(part))}
    return np.array(sorted(kept), int)


def rounded(values: np.ndarray, digits: int) -> list[float | None]:
    """Values in significant digits for JSON, None for a gap."""
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in values]
