"""How good texts are against references: BLEU and chrF of a corpus, F1 and exact match."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from recipes.errors import ConfigError, one_line
from recipes.languages import DEFAULT_BLEU_TOKENIZER, words
from recipes.registry import nearest

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def bleu(
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str = DEFAULT_BLEU_TOKENIZER,
) -> tuple[float, str]:
    """sacrebleu's BLEU of the corpus, 0 to 100, and its signature.

    The other settings are sacrebleu's defaults (smoothing exp).

    Args:
        texts: [N], not tokenised.
        references: [N] lists of one or more. Their numbers may differ, which the signature calls
            `nrefs:var`.
        tokenizer: of sacrebleu, as `13a`, `zh` or `ja-mecab`.

    Raises:
        ValueError: no texts, not a list of references for each text, or an empty one.
        ConfigError: as `check_bleu`.
    """
    return _corpus(_bleu(tokenizer), texts, references)


def check_bleu(tokenizer: str) -> None:
    """Refuse a tokenizer of BLEU that cannot be used here.

    Raises:
        ConfigError: sacrebleu has no such tokenizer, or what it needs is not there.
    """
    _bleu(tokenizer)


def _bleu(tokenizer: str) -> BLEU:
    known = BLEU.TOKENIZERS
    if tokenizer not in known:
        raise ConfigError(
            f"eval.bleu_tokenizer={tokenizer} is not known{nearest(tokenizer, known)}"
        )
    try:
        return BLEU(tokenize=tokenizer)
    except (RuntimeError, ImportError, OSError) as error:
        extra, mecab, _ = tokenizer.partition("-mecab")
        remedy = f"pip install 'sacrebleu[{extra}]'" if mecab else one_line(error, 100)
        raise ConfigError(
            f"eval.bleu_tokenizer={tokenizer} lacks what it needs ({remedy}); "
            "get it, or take eval.bleu_tokenizer=char"
        ) from error


def chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """sacrebleu's chrF2 of the corpus, 0 to 100, and its signature.

    It counts 6-grams of characters and no words. Arguments and errors are those of `bleu`.
    """
    return _corpus(CHRF(), texts, references)


def f1(text: str, references: Sequence[str]) -> float:
    """Overlap of words with the closest reference, in [0, 1].

    It is the harmonic mean of precision and recall, as in SQuAD's evaluation script. Both sides are
    in lower case, without ASCII punctuation and articles. Repeated words count as often as both
    have them. Text without spaces between words is compared by its characters. If a side has no
    words left, both must have none. That is the script's version 2; version 1 says 0.

    Args:
        text: one answer.
        references: one or more.

    Raises:
        ValueError: no references.
    """
    return max(_f1(_words(text), _words(reference)) for reference in _some(references))


def exact(text: str, references: Sequence[str]) -> float:
    """1.0 if the text is one of the references, both in the form that `f1` compares, else 0.0.

    Arguments and errors are those of `f1`.
    """
    own = _words(text)
    return float(any(own == _words(reference) for reference in _some(references)))


def text_scores(
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str = DEFAULT_BLEU_TOKENIZER,
) -> dict[str, float]:
    """`bleu` and `chrf` of the corpus, 0 to 100; `f1` and `exact`, means over texts, in [0, 1].

    Arguments and errors are those of `bleu`.
    """
    corpus = {"bleu": bleu(texts, references, tokenizer)[0], "chrf": chrf(texts, references)[0]}
    pairs = list(zip(texts, references))
    return corpus | {
        "f1": float(np.mean([f1(text, some) for text, some in pairs])),
        "exact": float(np.mean([exact(text, some) for text, some in pairs])),
    }


def _corpus(
    metric: BLEU | CHRF, texts: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, str]:
    if not texts or len(texts) != len(references):
        raise ValueError(
            f"{type(metric).__name__} needs at least one text, and a list of references for each; "
            f"there are {len(texts)} texts and {len(references)} lists"
        )
    # sacrebleu takes the first references of all texts, then the second ones. None stands where a
    # text has no second one.
    streams = list(zip_longest(*map(_some, references)))
    score = metric.corpus_score(texts, streams).score
    return score, str(metric.get_signature())


def _some(references: Sequence[str]) -> Sequence[str]:
    """The references. Raises ValueError: there are none, or they are one text."""
    # A text in place of the list would be taken for a list of its characters.
    if isinstance(references, str) or not references:
        raise ValueError(
            f"references of a text must be a list of one or more texts, not {references!r}"
        )
    return references


def _words(text: str) -> list[str]:
    # The script's order. Articles count once the punctuation is gone: "A." is one, "a-b" is not.
    bare = text.lower().translate(_PUNCTUATION)
    return words(_ARTICLES.sub(" ", bare))


def _f1(own: list[str], reference: list[str]) -> float:
    if not own or not reference:
        return float(own == reference)
    common = (Counter(own) & Counter(reference)).total()
    # 2 P R / (P + R) with P = common / own and R = common / reference.
    return 2 * common / (len(own) + len(reference))


def exact_answer(text: str, answer: str) -> float:
    """`exact` against one answer, as a verifier: 0.0 or 1.0."""
    return exact(text, [answer])
