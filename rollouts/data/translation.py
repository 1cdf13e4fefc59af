"""Generated translation with local reordering, whose ideal read schedule is known: an embedded data
set.

A sentence of the invented source language is 3 to 7 phrases, and a phrase is up to four modifiers
and then a noun. The target language has one word for each, and writes the noun first and its
modifiers in reversed order. So nothing of a phrase can be written before its last word, the noun,
has been read; and then all of it can:

    source    ribi damo   | kema       modifier noun | noun
    target    felam vilis | fufom      noun modifier | noun
    schedule      2     2       3      source words read before each target word can be known

Sentence `index` of a seed is computed directly, as stories are.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

from recipes.errors import DataError

# held out by the same hash, in the same share
from rollouts.data.stories import HELDOUT_PERCENT, hash_percent

SPLITS = ("train", "heldout")

PHRASES = (3, 7)  # the fewest and the most of a sentence, all numbers equally often
# the chance that a noun has 0, 1, … modifiers, all different
MODIFIER_COUNTS = (0.62, 0.14, 0.08, 0.08, 0.08)


@dataclass(frozen=True)
class Translation:
    """One sentence. `schedule` has an entry per target word: how many source words it takes to know
    it."""

    source: str
    target: str
    schedule: tuple[int, ...]


def _lexicon(nouns: int = 24, modifiers: int = 36) -> tuple[dict[str, str], dict[str, str]]:
    """The nouns and the modifiers, each with its translation.

    All source words have four letters and all target words five, so that none begins another. Nouns
    end in a or o, their translations in m or n; modifiers in e or i, in s or t."""
    rng = random.Random("lexicon")  # fixed: a model learns these words

    def words(count: int, *letters: str) -> list[str]:
        return rng.sample(["".join(word) for word in product(*letters)], count)

    first, second = (
        ("bdgklmnprst", "aeiou", "bdgklmnprst"),
        ("fhjlnrvz", "aeiou", "fhjlrvxz", "aeiou"),
    )
    return (
        dict(zip(words(nouns, *first, "ao"), words(nouns, *second, "mn"))),
        dict(zip(words(modifiers, *first, "ei"), words(modifiers, *second, "st"))),
    )


NOUNS, MODIFIERS = _lexicon()


def translation(seed: int, index: int, split: str) -> Translation:
    """Sentence `index` of a seed and split, the same in every process.

    Args:
        seed, index: any integers.
        split: `train` or `heldout`. A source sentence belongs to one of them by its hash, whatever
            the seed, so the two never share one.

    Raises:
        DataError: an unknown split.
    """
    if split not in SPLITS:
        raise DataError(
            f"the generated translation has no split '{split}'; use one of: {', '.join(SPLITS)}"
        )
    rng = random.Random(f"{seed}/{split}/{index}")
    while True:
        words: list[str] = []
        for _ in range(rng.randint(*PHRASES)):
            (count,) = rng.choices(range(len(MODIFIER_COUNTS)), MODIFIER_COUNTS)
            words += [*rng.sample(list(MODIFIERS), count), rng.choice(list(NOUNS))]
        source = " ".join(words)
        if (hash_percent(source) < HELDOUT_PERCENT) == (split == "heldout"):
            break
    phrases = _phrases(source)
    target = " ".join(
        word
        for *modifiers, noun in phrases
        for word in (NOUNS[noun], *(MODIFIERS[word] for word in reversed(modifiers)))
    )
    return Translation(source, target, ideal_schedule(source))


def ideal_schedule(source: str) -> tuple[int, ...]:
    """For each target word, how many source words have to be read before it can be known: to the
    end of its phrase.

    One entry per target word, not decreasing. That the target is over is known only when the source
    is.

    Raises:
        DataError: a word is not of the source language, or the last one is no noun.
    """
    schedule: list[int] = []
    for phrase in _phrases(source):
        # as many target words as source words
        schedule += [len(schedule) + len(phrase)] * len(phrase)
    return tuple(schedule)


def _phrases(source: str) -> list[list[str]]:
    phrases: list[list[str]] = [[]]
    for word in source.split():
        if word not in NOUNS and word not in MODIFIERS:
            raise DataError(
                f"'{word}' is no word of the generated translation's source language; use its sentences"
            )
        phrases[-1].append(word)
        if word in NOUNS:
            phrases.append([])
    if phrases.pop():
        raise DataError(
            f"the last phrase of '{source}' has no noun; end it with one, such as {next(iter(NOUNS))}"
        )
    return phrases
