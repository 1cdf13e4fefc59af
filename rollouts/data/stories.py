"""Generated arithmetic stories with worked solutions: the embedded data set, training and held-out.

A story is a start sentence, one sentence per operation and one question. Its solution has one
thought per sentence, so that a streaming reasoner can think after each, and a boxed answer. Story
`index` of a seed is computed directly, so a data set of any size costs nothing to make or store."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

from recipes.errors import DataError
from rollouts.data.marks import SKIP

SPLITS = ("train", "validation", "heldout")
# Of the arithmetic chains. Results are reported on the held-out ones.
HELDOUT_PERCENT = 15
# Settings are chosen on these.
VALIDATION_PERCENT = 10
# From this difficulty on there is multiplication, and numbers go up to 999 instead of 99.
HARD = 4
# The largest amount added or taken below that difficulty. Tiny models learn it in a minute.
SMALL = 20
# So many repeats in a row end the search for chains that differ.
PATIENCE = 1000

NAMES = (
    *(
        (name, "She")
        for name in ("Mia", "Ana", "Eva", "Lily", "Nora", "Zoe", "Ella", "Ruth", "Ivy", "Rosa")
    ),
    *(
        (name, "He")
        for name in ("Tom", "Ben", "Sam", "Leo", "Max", "Dan", "Jack", "Omar", "Hugo", "Paul")
    ),
)
ITEMS = (
    "shells",
    "apples",
    "coins",
    "stamps",
    "cards",
    "pens",
    "books",
    "balls",
    "stones",
    "cups",
    "keys",
    "eggs",
    "nuts",
    "toys",
    "plums",
    "rings",
    "beads",
    "cakes",
    "hats",
    "boxes",
)
SENTENCES = {
    "+": (
        "{who} finds {n} more.",
        "{who} buys {n} more.",
        "{who} wins {n} more.",
        "{who} gets {n} from {other}.",
    ),
    "-": (
        "{who} gives {n} to {other}.",
        "{who} loses {n}.",
        "{who} sells {n}.",
        "{who} throws {n} away.",
    ),
    "*": ("{who} now has {n} times as many.", "{who} ends up with {n} times as many."),
}
EXPLANATIONS = {
    "+": "so we add {n} to {before}",
    "-": "so we take {n} from {before}",
    "*": "so we multiply {before} by {n}",
}
INVERSE = {"+": "-", "-": "+", "*": "/"}
# The chance of each redundant sentence of a verbose solution. One of these, equally often, holds
# for a whole solution, so that there are short solutions to select: with 0.8 throughout, fewer than
# 1 in 100 has under half the mean length. There is no 1.0: a fixed form is learned better than a
# varied one, and then the short answers would be the worse ones.
REDUNDANT = (0.3, 0.8, 0.8)
# Sentences that change nothing. The last three have numbers that do not matter.
DISTRACTORS = (
    "The sun is shining.",
    "It starts to rain.",
    "{name} likes {other_item}.",
    "{name} sings a song.",
    "The dog is asleep.",
    "Today is a school day.",
    "{name} is {n} years old.",
    "It is {n} degrees outside.",
    "The bus leaves in {n} minutes.",
)
# Of varied solutions: the chance that a relevant sentence is followed by a thought. It is drawn per
# solution, all equally often.
THINKS = (0.4, 0.8, 1.0, 1.0)
# The chance that a distractor is followed by a thought nonetheless.
IDLE = 0.25
# The chance that the deep segment works out everything once more.
AGAIN = 0.3
# The most steps in a thought, so that it fits the limit of tokens per sentence.
CATCH_UP = 2
NOTHING = "Nothing changes."


@dataclass(frozen=True)
class Story:
    """One problem with its solution."""

    sentences: tuple[str, ...]
    question: str
    # One per sentence; <skip> where there is nothing to think.
    thoughts: tuple[str, ...]
    # The end of the solution, with the boxed answer.
    final: str
    answer: str
    # The reasoning after the last thought, which only varied solutions have.
    deep: str = ""

    @property
    def prompt(self) -> str:
        """The sentences and the question."""
        return " ".join((*self.sentences, self.question))

    @property
    def solution(self) -> str:
        """The thoughts, the deep reasoning and the answer, without what is skipped."""
        parts = (*self.thoughts, self.deep, self.final)
        return " ".join(text for text in parts if text not in ("", SKIP))


@dataclass(frozen=True)
class Step:
    """`before sign n = after`."""

    before: int
    sign: str
    n: int
    after: int

    @property
    def equation(self) -> str:
        return f"{self.before} {self.sign} {self.n} = {self.after}."

    @property
    def check(self) -> str:
        return f"Check: {self.after} {INVERSE[self.sign]} {self.n} = {self.before}."


def story(
    seed: int,
    index: int,
    split: str,
    difficulty: int,
    verbose: bool = False,
    distractors: int = 0,
    varied: bool = False,
) -> Story:
    """Story `index` of a seed and split, the same in every process.

    A chain is a start number with its operations. The hash of a chain says to which split it
    belongs, whatever the names, the items, the seed or the difficulty. So no two splits share a
    problem.

    Args:
        seed, index: any integers.
        split: `train`, `validation` or `heldout`.
        difficulty: stories have 1 to this many operations, equally often. Below 4 these are + and -
            of 1 to 20, on numbers 0 to 99. From 4 on there is also * by 2 to 5, on numbers 0 to
            999.
        verbose: the same story, solved with redundant sentences: restated, explained, checked by
            the inverse operation. Each is present with a probability that is drawn for the
            solution.
        distractors: 0 to this many sentences that change nothing come between the others, equally
            often.
        varied: the same story, solved in one of many ways, for the cold start of streaming
            reasoners. Some thoughts are left out, and a later one or the deep segment catches up.
            Some things are thought without need.

    Raises:
        DataError: an unknown split, or a difficulty below 1.
    """
    rng, start, steps = _draw_chain(seed, index, split, difficulty)
    name, pronoun = rng.choice(NAMES)
    item = rng.choice(ITEMS)
    sentences = [f"{name} has {start} {item}.", *_step_sentences(rng, steps, name, pronoun)]
    thoughts = [f"Start: {start}.", *(step.equation for step in steps)]
    answer = str(steps[-1].after)
    final = f"The answer is \\boxed{{{answer}}}."
    if verbose:
        rate = rng.choice(REDUNDANT)
        thoughts = _verbose_thoughts(rng, rate, steps, sentences, thoughts)
        final = _pad(rng, rate, [f"So {name} has {answer} {item} now."], final, [])
    if distractors:
        # They are drawn last: without them the story is the same.
        _insert_distractors(rng, distractors, name, item, sentences, thoughts)
    deep = ""
    if varied:
        thoughts, deep = _vary(rng, thoughts)
    question = f"How many {item} does {name} have now?"
    return Story(tuple(sentences), question, tuple(thoughts), final, answer, deep)


def stories(count: int, *, seed: int, split: str, difficulty: int, **options) -> list[Story]:
    """The first `count` stories of a split, with the options of `story`.

    Validation and held-out stories have different chains while enough exist. Repeats are passed
    over until 1,000 in a row were, and are allowed from there on: difficulty 1 has about 500
    held-out chains. A shorter list is a prefix of a longer one. Training stories are simply those
    of index 0, 1, …

    Raises:
        DataError: as `story`.
    """
    if split == "train":
        indices = list(range(count))
    else:
        indices = _distinct_indices(count, seed, split, difficulty)
    return [story(seed, index, split, difficulty, **options) for index in indices]


def _distinct_indices(count: int, seed: int, split: str, difficulty: int) -> list[int]:
    """The first `count` indices whose chains differ, then any, where there are not so many."""
    indices: list[int] = []
    seen: set[str] = set()
    index = repeats = 0
    while len(indices) < count and repeats < PATIENCE:
        _, start, steps = _draw_chain(seed, index, split, difficulty)
        chain = _chain(start, steps)
        if chain in seen:
            repeats += 1
        else:
            repeats = 0
            seen.add(chain)
            indices.append(index)
        index += 1
    return [*indices, *range(index, index + count - len(indices))]


# The chain of numbers


def _draw_chain(
    seed: int, index: int, split: str, difficulty: int
) -> tuple[random.Random, int, list[Step]]:
    """The generator after its draws, the start number, and the steps, one or more."""
    if split not in SPLITS:
        raise DataError(f"stories have no split '{split}'; use one of: {', '.join(SPLITS)}")
    if difficulty < 1:
        raise DataError(
            f"stories of difficulty {difficulty} do not exist; data.difficulty must be 1 or more"
        )
    # A string seeds by its SHA-512, not by hash(), so a story is the same in every process.
    rng = random.Random(f"{seed}/{split}/{difficulty}/{index}")
    is_hard = difficulty >= HARD
    while True:
        start = rng.randint(2, 999 if is_hard else 99)
        steps: list[Step] = []
        for _ in range(rng.randint(1, difficulty)):
            steps.append(_draw_step(rng, steps[-1].after if steps else start, is_hard))
        if _split(_chain(start, steps)) == split:
            return rng, start, steps


def _draw_step(rng: random.Random, value: int, is_hard: bool) -> Step:
    limit = 999 if is_hard else 99
    amount = limit if is_hard else SMALL
    largest = {"+": min(limit - value, amount), "-": min(value, amount)}
    if is_hard and 0 < value <= limit // 2:
        largest["*"] = min(5, limit // value)
    sign = rng.choice([sign for sign, n in largest.items() if n > 0])
    n = rng.randint(2 if sign == "*" else 1, largest[sign])
    after = {"+": value + n, "-": value - n, "*": value * n}[sign]
    return Step(value, sign, n, after)


def _chain(start: int, steps: list[Step]) -> str:
    return str(start) + "".join(f"{step.sign}{step.n}" for step in steps)


def _split(chain: str) -> str:
    percent = hash_percent(chain)
    if percent < HELDOUT_PERCENT:
        return "heldout"
    return "validation" if percent < HELDOUT_PERCENT + VALIDATION_PERCENT else "train"


def hash_percent(text: str) -> int:
    """A hash of a text, 0 to 99, which puts the text into a split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 100


# Its words


def _step_sentences(
    rng: random.Random, steps: list[Step], name: str, pronoun: str
) -> Iterator[str]:
    others = [other for other, _ in NAMES if other != name]
    for step in steps:
        sentence = rng.choice(SENTENCES[step.sign])
        yield sentence.format(who=pronoun, n=step.n, other=rng.choice(others))


def _verbose_thoughts(
    rng: random.Random, rate: float, steps: list[Step], sentences: list[str], thoughts: list[str]
) -> list[str]:
    """The thoughts with redundant sentences around them, each with the chance `rate`."""
    start = steps[0].before
    padded = [_pad(rng, rate, [sentences[0], f"So we begin with {start}."], thoughts[0], [])]
    for step, sentence, thought in zip(steps, sentences[1:], thoughts[1:]):
        reason = EXPLANATIONS[step.sign].format(n=step.n, before=step.before)
        explanation = f"{sentence.removesuffix('.')}, {reason}."
        padded.append(_pad(rng, rate, [explanation], thought, [step.check]))
    return padded


def _pad(rng: random.Random, rate: float, before: list[str], step: str, after: list[str]) -> str:
    def some(texts: list[str]) -> list[str]:
        return [text for text in texts if rng.random() < rate]

    return " ".join([*some(before), step, *some(after)])


def _insert_distractors(
    rng: random.Random,
    most: int,
    name: str,
    item: str,
    sentences: list[str],
    thoughts: list[str],
) -> None:
    """Put 0 to `most` distractors among the sentences, each with a <skip> among the thoughts."""
    other_items = [other for other in ITEMS if other != item]
    for _ in range(rng.randint(0, most)):
        place = rng.randint(0, len(sentences))
        distractor = rng.choice(DISTRACTORS)
        n = rng.randint(2, 20)
        other_item = rng.choice(other_items)
        sentences.insert(place, distractor.format(name=name, n=n, other_item=other_item))
        thoughts.insert(place, SKIP)


def _vary(rng: random.Random, ideal: list[str]) -> tuple[list[str], str]:
    """One way to solve a story: its thoughts and its deep reasoning.

    Args:
        ideal: a thought per sentence, <skip> after a distractor.
    """
    rate = rng.choice(THINKS)
    thoughts: list[str] = []
    # Steps that no thought has worked out yet.
    due: list[str] = []
    for thought in ideal:
        if thought == SKIP:
            thoughts.append(NOTHING if rng.random() < IDLE else SKIP)
            continue
        due.append(thought)
        if rng.random() < rate:
            thoughts.append(" ".join(due[:CATCH_UP]))
            due = due[CATCH_UP:]
        else:
            thoughts.append(SKIP)
    if rng.random() < AGAIN:
        due = [thought for thought in ideal if thought != SKIP]
    return thoughts, " ".join(due)
