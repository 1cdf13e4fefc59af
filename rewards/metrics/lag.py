"""How far a written text lags behind the reading: of one sentence, from counts of source units.

phi(t) is the number of source units read when target word t = 1..L was written, M the length of the
source; a unit is a word, a token or a millisecond. phi may be 0, of a word written before anything
was read.

RCO and AIL are those of ProactiveLLM (arXiv 2606.00523). AL (arXiv 1810.08398) and LAAL (arXiv
2204.06028, 2206.05807) are SimulEval's `ALScorer` and `LAALScorer`. SimulEval's value of a corpus
is the mean over its sentences, those without a target word left out."""

from __future__ import annotations

from typing import Sequence

import numpy as np


def rco(delays: Sequence[float], source: float) -> float:
    """The share of the source that was read, mean over target words: mean(phi(t) / M), in [0, 1]; 1
    reads all first.

    Args:
        delays: phi, [L], not decreasing, 0 to M.
        source: M, above 0.

    Raises:
        ValueError: no delays, or delays that decrease, are below 0 or above the source; a source of
            0 or less.
    """
    return float(_read(delays, source).mean() / source)


def ail(delays: Sequence[float], source: float) -> float:
    """Lag behind the ideal pace, in source units, mean over all target words: mean(phi(t) - (t - 1)
    M / L).

    The ideal pace spreads the L words that were written evenly over the source. Arguments and
    errors as in `rco`."""
    phi = _read(delays, source)
    return float((phi - np.arange(len(phi)) * source / len(phi)).mean())


def average_lagging(
    delays: Sequence[float], source: float, reference_length: int | None = None
) -> float:
    """AL in source units: mean of phi(t) - (t - 1) / gamma over t = 1..tau, gamma = reference
    length / M.

    tau is the first word written with the whole source read; L, where none was. Words after it wait
    for nothing. As in SimulEval, delays may pass the end of the source, as times may; a first one
    that does is itself the result. A text longer than its reference gets a smaller AL, below 0
    even: `laal` does not reward that.

    Args:
        delays: phi, [L], not decreasing, 0 or more.
        source: M, above 0.
        reference_length: words of the reference; None counts those that were written, as SimulEval
            without references.

    Raises:
        ValueError: no delays, or delays that decrease or are below 0; a source of 0 or less; a
            reference without words.
    """
    phi = _checked(delays, source)
    length = len(phi) if reference_length is None else reference_length
    if length < 1:
        raise ValueError(
            f"AL needs a reference of 1 word or more, not {length}; give None to count those written"
        )
    # t = 1..tau; one word, where already the first is past the end
    phi = phi[: np.searchsorted(phi, source) + 1]
    return float((phi - np.arange(len(phi)) * source / length).mean())


def laal(delays: Sequence[float], source: float, reference_length: int) -> float:
    """Length-adaptive AL, in source units: `average_lagging` by the longer of the reference and the
    text written."""
    return average_lagging(delays, source, max(len(delays), reference_length))


def lags(delays: Sequence[float], source: float, reference_length: int) -> dict[str, float]:
    """All four of one sentence: `rco` in [0, 1], `ail`, `al` and `laal` in source units; errors of
    `rco` and AL."""
    return {
        "rco": rco(delays, source),
        "ail": ail(delays, source),
        "al": average_lagging(delays, source, reference_length),
        "laal": laal(delays, source, reference_length),
    }


def _checked(delays: Sequence[float], source: float) -> np.ndarray:
    phi = np.asarray(delays, float)
    if not phi.size or source <= 0:
        raise ValueError(
            "a lag needs at least one target word and a source, "
            f"not {phi.size} words of a source of {source}"
        )
    wrong = ~(np.diff(phi, prepend=0) >= 0)  # of NaN too
    if wrong.any():
        raise ValueError(
            f"delays must be 0 or more and never decrease: {_around(phi, wrong.argmax())}"
        )
    return phi


def _read(delays: Sequence[float], source: float) -> np.ndarray:
    phi = _checked(delays, source)
    if phi[-1] > source:
        raise ValueError(
            f"delays must not pass the source of {source} units: {_around(phi, (phi > source).argmax())}"
        )
    return phi


def _around(phi: np.ndarray, t: int) -> str:
    return f"word {t + 1} has {phi[t]:g}" + (f" after {phi[t - 1]:g}" if t else "")
