"""Generated translation with local reordering, whose ideal read schedule is known.

A sentence of the invented source language is 3 to 7 phrases. A phrase is up to four modifiers and
then a noun. The target language has one word for each. It writes the noun first, and its modifiers
in reversed order. So nothing of a phrase can be written before its last word, the noun, has been
read; and then all of it can:

    source    ribi damo   | kema       modifier noun | noun
    target    felam vilis | fufom      noun modifier | noun
    schedule      2     2       3      source words read before each target word can be known

Sentence `index` of a seed is computed directly, as stories are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from recipes.errors import DataError
from rollouts.data.stories import HELDOUT_PERCENT, hash_percent

SPLITS = ("train", "heldout")

# The fewest and the most phrases of a sentence; all numbers are equally frequent.
PHRASES = (3, 7)
# The chance that a noun has 0, 1, … modifiers, all different.
MODIFIER_COUNTS = (0.62, 0.14, 0.08, 0.08, 0.08)


@dataclass(frozen=True)
class Translation:
    """One sentence in both languages."""

    source: str
    target: str
    # Per target word, the number of source words that it takes to know it.
    schedule: tuple[int, ...]


def _lexicon(nouns: int = 24, modifiers: int = 36) -> tuple[dict[str, str], dict[str, str]]:
    """The nouns and the modifiers, each with its translation.

    All source words have four letters and all target words five, so that no word begins another.
    Nouns end in a or o, their translations in m or n. Modifiers end in e or i, their translations
    in s or t."""
    # The seed is fixed, since a model learns these words.
    rng = random.Random("lexicon")

    def words(count: int, *letters: str) -> list[str]:
        return rng.sample(["".join(word) for word in product(*letters)], count)

    source = ("bdgklmnprst", "aeiou", "bdgklmnprst")
    target = ("fhjlnrvz", "aeiou", "fhjlrvxz", "aeiou")
    source_nouns = words(nouns, *source, "ao")
    target_nouns = words(nouns, *target, "mn")
    source_modifiers = words(modifiers, *source, "ei")
    target_modifiers = words(modifiers, *target, "st")
    return dict(zip(source_nouns, target_nouns)), dict(zip(source_modifiers, target_modifiers))


NOUNS, MODIFIERS = _lexicon()


def translation(seed: int, index: int, split: str) -> Translation:
    """Sentence `index` of a seed and split, the same in every process.

    The hash of a source sentence says to which split it belongs, whatever the seed, so the two
    splits never share one. The held-out share is that of the stories.

    Args:
        seed, index: any integers.
        split: `train` or `heldout`.

    Raises:
        DataError: an unknown split.
    """
    if split not in SPLITS:
        raise DataError(
            f"the generated translation has no split '{split}'; use one of: {', '.join(SPLITS)}"
        )
    rng = random.Random(f"{seed}/{split}/{index}")
    while True:
        source = _draw_source(rng)
        is_held_out = hash_percent(source) < HELDOUT_PERCENT
        if is_held_out == (split == "heldout"):
            break
    target = " ".join(word for phrase in _phrases(source) for word in _translate(phrase))
    return Translation(source, target, ideal_schedule(source))


def _draw_source(rng: random.Random) -> str:
    words: list[str] = []
    for _ in range(rng.randint(*PHRASES)):
        (count,) = rng.choices(range(len(MODIFIER_COUNTS)), MODIFIER_COUNTS)
        words += rng.sample(list(MODIFIERS), count)
        words.append(rng.choice(list(NOUNS)))
    return " ".join(words)


def _translate(phrase: Sequence[str]) -> list[str]:
    *modifiers, noun = phrase
    return [NOUNS[noun], *(MODIFIERS[word] for word in reversed(modifiers))]


def ideal_schedule(source: str) -> tuple[int, ...]:
    """For each target word, the number of source words to read before it can be known.

    The words of a phrase are known at its end, so the numbers do not decrease. That the target is
    over is known only when the source is.

    Args:
        source: a sentence of the source language.

    Raises:
        DataError: a word is not of the source language, or the last one is no noun.
    """
    schedule: list[int] = []
    for phrase in _phrases(source):
        # A phrase has as many target words as source words.
        end = len(schedule) + len(phrase)
        schedule += [end] * len(phrase)
    return tuple(schedule)


def _phrases(source: str) -> list[list[str]]:
    phrases: list[list[str]] = [[]]
    for word in source.split():
        if word not in NOUNS and word not in MODIFIERS:
            raise DataError(
                f"'{word}' is no word of the generated translation's source language; "
                "use its sentences"
            )
        phrases[-1].append(word)
        if word in NOUNS:
            phrases.append([])
    if phrases.pop():
        raise DataError(
            f"the last phrase of '{source}' has no noun; end it with one, "
            f"such as {next(iter(NOUNS))}"
        )
    return phrases
