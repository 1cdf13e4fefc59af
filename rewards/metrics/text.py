"""How good written texts are against references: BLEU and chrF of a corpus, F1 and exact match of
answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from itertools import zip_longest
from typing import Sequence

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """sacrebleu's BLEU of the corpus, 0 to 100, and its signature; the settings are sacrebleu's own
    (13a, exp).

    Args:
        texts: [N], not tokenised.
        references: [N] lists of one or more; their numbers may differ, which the signature calls
            `nrefs:var`.

    Raises:
        ValueError: no texts, not a list of references for each text, or an empty one.
    """
    return _corpus(BLEU(), texts, references)


def chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """sacrebleu's chrF2 of the corpus, 0 to 100, and its signature: 6-grams of characters, no
    words. Else as `bleu`."""
    return _corpus(CHRF(), texts, references)


def f1(text: str, references: Sequence[str]) -> float:
    """Overlap of words with the closest reference, in [0, 1]: the harmonic mean of precision and
    recall.

    As SQuAD's evaluation script: both sides in lower case, without ASCII punctuation and articles;
    repeated words count as often as both have them. Where a side has no words left, both must have
    none (its version 2; version 1 says 0).

    Raises:
        ValueError: no references.
    """
    return max(_f1(_words(text), _words(reference)) for reference in _some(references))


def exact(text: str, references: Sequence[str]) -> float:
    """1.0 if the text is one of the references, both in the form that `f1` compares, else 0.0;
    errors as there."""
    return float(any(_words(text) == _words(reference) for reference in _some(references)))


def text_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu` and `chrf` of the corpus, 0 to 100; `f1` and `exact`, means over texts, in [0, 1];
    errors of `bleu`."""
    return {
        "bleu": bleu(texts, references)[0],
        "chrf": chrf(texts, references)[0],
        "f1": float(np.mean([f1(*pair) for pair in zip(texts, references)])),
        "exact": float(np.mean([exact(*pair) for pair in zip(texts, references)])),
    }


def _corpus(
    metric: BLEU | CHRF, texts: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, str]:
    if not texts or len(texts) != len(references):
        raise ValueError(
            f"{type(metric).__name__} needs at least one text, and a list of references for each; "
            f"there are {len(texts)} texts and {len(references)} lists"
        )
    # sacrebleu takes the first references of all texts, then the second ones; None where a text has
    # no such one.
    score = metric.corpus_score(texts, list(zip_longest(*map(_some, references)))).score
    return score, str(metric.get_signature())


def _some(references: Sequence[str]) -> Sequence[str]:
    # A text in place of the list would be taken for a list of its characters.
    if isinstance(references, str) or not references:
        raise ValueError(
            f"references of a text must be a list of one or more texts, not {references!r}"
        )
    return references


def _words(text: str) -> list[str]:
    # In the script's order: an article is one only after the punctuation is gone ("A." is, "a-b" is
    # not).
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(words: list[str], reference: list[str]) -> float:
    common = (Counter(words) & Counter(reference)).total()
    # 2 P R / (P + R) with P = common / words and R = common / reference.
    return (
        2 * common / (len(words) + len(reference))
        if words and reference
        else float(words == reference)
    )


def exact_answer(text: str, answer: str) -> float:
    """`exact` against one answer, as a verifier."""
    return exact(text, [answer])
