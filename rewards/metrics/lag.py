"""How far the text written for one sentence lags behind the reading, from counts of source units.

phi(t) is the number of source units read when target word t = 1..L was written. M is the length of
the source. A unit is a word, a token or a millisecond. phi is 0 for a word that was written before
anything was read.

RCO and AIL are those of ProactiveLLM (arXiv 2606.00523). AL (arXiv 1810.08398) and LAAL (arXiv
2204.06028, 2206.05807) are SimulEval's `ALScorer` and `LAALScorer`. SimulEval's value of a corpus
is the mean over its sentences, without those that have no target word.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rco(delays: Sequence[float], source: float) -> float:
    """The share of the source that was read, mean over target words: mean(phi(t) / M).

    It is in [0, 1]. A text that is written after all was read has 1.

    Args:
        delays: phi, [L], not decreasing, 0 to M.
        source: M, above 0.

    Raises:
        ValueError: no delays, or delays that decrease, are below 0 or above the source; a source of
            0 or less.
    """
    return float(_read(delays, source).mean() / source)


def ail(delays: Sequence[float], source: float) -> float:
    """Lag behind the ideal pace, in source units, mean over target words.

    It is mean(phi(t) - (t - 1) M / L). The ideal pace spreads the L words that were written evenly
    over the source. Arguments and errors are those of `rco`.
    """
    phi = _read(delays, source)
    ideal = np.arange(len(phi)) * source / len(phi)
    return float((phi - ideal).mean())


def average_lagging(
    delays: Sequence[float], source: float, reference_length: int | None = None
) -> float:
    """AL in source units: the mean of phi(t) - (t - 1) M / R over t = 1..tau.

    R is the length of the reference. tau is the first word written with the whole source read, or L
    where none was. Words after it wait for nothing. As in SimulEval, delays may pass the end of the
    source, as times may. A first delay that does is itself the result. A text longer than its
    reference gets a smaller AL, even below 0. `laal` does not reward that.

    Args:
        delays: phi, [L], not decreasing, 0 or more.
        source: M, above 0.
        reference_length: R, in words. None counts the words that were written, as SimulEval does
            without references.

    Raises:
        ValueError: no delays, or delays that decrease or are below 0; a source of 0 or less; a
            reference without words.
    """
    phi = _checked(delays, source)
    length = len(phi) if reference_length is None else reference_length
    if length < 1:
        raise ValueError(
            f"AL needs a reference of 1 word or more, not {length}; "
            "give None to count those written"
        )
    # t = 1..tau: a single word, if the first is already past the end.
    phi = phi[: np.searchsorted(phi, source) + 1]
    ideal = np.arange(len(phi)) * source / length
    return float((phi - ideal).mean())


def laal(delays: Sequence[float], source: float, reference_length: int) -> float:
    """Length-adaptive AL, in source units: R is the longer of the reference and the text written.

    Arguments and errors are those of `average_lagging`.
    """
    return average_lagging(delays, source, max(len(delays), reference_length))


def lags(delays: Sequence[float], source: float, reference_length: int) -> dict[str, float]:
    """All four of one sentence: `rco` in [0, 1]; `ail`, `al` and `laal` in source units.

    Arguments and errors are those of `rco` and `average_lagging`.
    """
    return {
        "rco": rco(delays, source),
        "ail": ail(delays, source),
        "al": average_lagging(delays, source, reference_length),
        "laal": laal(delays, source, reference_length),
    }


def _checked(delays: Sequence[float], source: float) -> np.ndarray:
    """phi [L], for AL, whose delays may pass the source. Raises ValueError: as in `rco`."""
    phi = np.asarray(delays, float)
    if not phi.size or source <= 0:
        raise ValueError(
            "a lag needs at least one target word and a source, "
            f"not {phi.size} words of a source of {source}"
        )
    # The negated comparison finds NaN too.
    wrong = ~(np.diff(phi, prepend=0) >= 0)
    if wrong.any():
        place = _around(phi, int(wrong.argmax()))
        raise ValueError(f"delays must be 0 or more and never decrease: {place}")
    return phi


def _read(delays: Sequence[float], source: float) -> np.ndarray:
    """phi [L], at most M. Raises ValueError: as in `rco`."""
    phi = _checked(delays, source)
    if phi[-1] > source:
        place = _around(phi, int((phi > source).argmax()))
        raise ValueError(f"delays must not pass the source of {source} units: {place}")
    return phi


def _around(phi: np.ndarray, t: int) -> str:
    """The delay at t = 0, 1, … and the one before it, in words."""
    before = f" after {phi[t - 1]:g}" if t else ""
    return f"word {t + 1} has {phi[t]:g}{before}"
