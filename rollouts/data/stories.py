"""Generated arithmetic stories with worked solutions: the embedded data set, training and held-out.

A story is a start sentence, one sentence per operation and one question. Its solution has one
thought per sentence, so that a streaming reasoner can think after each, and a boxed answer. Story
`index` of a seed is computed directly, so a data set of any size costs nothing to make, and nothing
to store."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from recipes.errors import DataError
from rollouts.data.marks import SKIP

SPLITS = ("train", "validation", "heldout")
HELDOUT_PERCENT = 15  # of the arithmetic chains; what results are reported on
VALIDATION_PERCENT = 10  # what settings are chosen on
HARD = 4  # from this difficulty on: multiplication, and numbers up to 999 instead of 99
SMALL = 20  # the largest amount added or taken below that: tiny models learn it in a minute

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
# Chance of each redundant sentence of a verbose solution; one of these, equally often, holds for a
# whole solution. So there are short ones to select: with 0.8 throughout, fewer than 1 in 100 has
# under half the mean length. No 1.0: a fixed form is learned better than a varied one, and then the
# short answers would be the worse ones.
REDUNDANT = (0.3, 0.8, 0.8)
# Sentences that change nothing; the last three have numbers that do not matter.
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
# Varied solutions. Chance that a relevant sentence is followed by a thought, drawn per solution;
# chance that a distractor is followed by one nonetheless, and that the deep segment works out
# everything once more.
THINKS = (0.4, 0.8, 1.0, 1.0)
IDLE, AGAIN = 0.25, 0.3
CATCH_UP = 2  # the most steps in a thought, so that it fits the limit of tokens per sentence
NOTHING = "Nothing changes."


@dataclass(frozen=True)
class Story:
    """One problem. It has as many thoughts as sentences, <skip> where there is nothing to think.
    After them come `deep` reasoning, which only varied solutions have, and `final` with the boxed
    answer."""

    sentences: tuple[str, ...]
    question: str
    thoughts: tuple[str, ...]
    final: str
    answer: str
    deep: str = ""

    @property
    def prompt(self) -> str:
        return " ".join((*self.sentences, self.question))

    @property
    def solution(self) -> str:
        return " ".join(
            text for text in (*self.thoughts, self.deep, self.final) if text not in ("", SKIP)
        )


@dataclass(frozen=True)
class Step:
    """`before sign n = after`."""

    before: int
    sign: str
    n: int
    after: int


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

    Args:
        seed, index: any integers.
        split: `train`, `validation` or `heldout`. A chain (start number, operations) belongs to one
            of them by its hash, whatever the names, the items, the seed or the difficulty, so no
            two share a problem.
        difficulty: stories have 1 to this many operations, equally often. Below 4 these are + and -
            of 1 to 20, on numbers 0 to 99; from 4 on also * by 2 to 5, on numbers 0 to 999.
        verbose: the same story, solved with redundant sentences (restated, explained, checked by
            the inverse operation), each present with a probability that is drawn for the solution.
        distractors: 0 to this many sentences that change nothing come between the others, equally
            often.
        varied: for the cold start of streaming reasoners, the same story, solved in one of many
            ways: some thoughts are left out, a later one or the deep segment catches up, and some
            things are thought without need.

    Raises:
        DataError: an unknown split, or a difficulty below 1.
    """
    rng, start, steps = _draw(seed, index, split, difficulty)
    (name, who), item = rng.choice(NAMES), rng.choice(ITEMS)
    others = [other for other, _ in NAMES if other != name]
    sentences = [f"{name} has {start} {item}."]
    for step in steps:
        sentences.append(
            rng.choice(SENTENCES[step.sign]).format(who=who, n=step.n, other=rng.choice(others))
        )
    thoughts = [f"Start: {start}."] + [f"{s.before} {s.sign} {s.n} = {s.after}." for s in steps]
    answer = str(steps[-1].after)
    final = f"The answer is \\boxed{{{answer}}}."
    if verbose:
        rate = rng.choice(REDUNDANT)
        thoughts = [
            _pad(rng, rate, [sentences[0], f"So we begin with {start}."], thoughts[0], [])
        ] + [
            _pad(
                rng,
                rate,
                [f"{sentence[:-1]}, {EXPLANATIONS[s.sign].format(n=s.n, before=s.before)}."],
                thought,
                [f"Check: {s.after} {INVERSE[s.sign]} {s.n} = {s.before}."],
            )
            for s, sentence, thought in zip(steps, sentences[1:], thoughts[1:])
        ]
        final = _pad(rng, rate, [f"So {name} has {answer} {item} now."], final, [])
    if distractors:  # after all other draws: without them the story is the same
        other_items = [other for other in ITEMS if other != item]
        for _ in range(rng.randint(0, distractors)):
            place = rng.randint(0, len(sentences))
            sentences.insert(
                place,
                rng.choice(DISTRACTORS).format(
                    name=name, n=rng.randint(2, 20), other_item=rng.choice(other_items)
                ),
            )
            thoughts.insert(place, SKIP)
    deep = ""
    if varied:
        thoughts, deep = _vary(rng, thoughts)
    return Story(
        tuple(sentences),
        f"How many {item} does {name} have now?",
        tuple(thoughts),
        final,
        answer,
        deep,
    )


def stories(count: int, *, seed: int, split: str, difficulty: int, **options) -> list[Story]:
    """`count` stories of a split, with the options of `story`.

    Validation and held-out stories have different chains while enough exist: repeats are passed
    over until 1,000 in a row were (difficulty 1 has about 500 held-out chains), and allowed from
    there on. A shorter list is a prefix of a longer one. Training stories are simply those of index
    0, 1, …

    Raises:
        DataError: as `story`.
    """
    if split == "train":
        return [story(seed, index, split, difficulty, **options) for index in range(count)]
    indices, seen, index, missed = [], set(), 0, 0
    while len(indices) < count and missed < 1000:
        chain = _chain(*_draw(seed, index, split, difficulty)[1:])
        missed = missed + 1 if chain in seen else 0
        if chain not in seen:
            indices.append(index)
            seen.add(chain)
        index += 1
    indices += range(index, index + count - len(indices))
    return [story(seed, index, split, difficulty, **options) for index in indices]


def _draw(
    seed: int, index: int, split: str, difficulty: int
) -> tuple[random.Random, int, list[Step]]:
    if split not in SPLITS:
        raise DataError(f"stories have no split '{split}'; use one of: {', '.join(SPLITS)}")
    if difficulty < 1:
        raise DataError(
            f"stories of difficulty {difficulty} do not exist; data.difficulty must be 1 or more"
        )
    # a string seeds by its SHA-512, not hash()
    rng = random.Random(f"{seed}/{split}/{difficulty}/{index}")
    limit = 999 if difficulty >= HARD else 99
    while True:
        start = value = rng.randint(2, limit)
        steps = []
        for _ in range(rng.randint(1, difficulty)):
            amount = limit if difficulty >= HARD else SMALL
            largest = {"+": min(limit - value, amount), "-": min(value, amount)}
            if difficulty >= HARD and 0 < value <= limit // 2:
                largest["*"] = min(5, limit // value)
            sign = rng.choice([sign for sign, n in largest.items() if n > 0])
            n = rng.randint(2 if sign == "*" else 1, largest[sign])
            after = {"+": value + n, "-": value - n, "*": value * n}[sign]
            steps.append(Step(value, sign, n, after))
            value = after
        if _split(_chain(start, steps)) == split:
            return rng, start, steps


def _chain(start: int, steps: list[Step]) -> str:
    return str(start) + "".join(f"{step.sign}{step.n}" for step in steps)


def hash_percent(text: str) -> int:
    """A hash of a text, 0 to 99: what puts it into a split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 100


def _split(chain: str) -> str:
    place = hash_percent(chain)
    if place < HELDOUT_PERCENT:
        return "heldout"
    return "validation" if place < HELDOUT_PERCENT + VALIDATION_PERCENT else "train"


def _vary(rng: random.Random, ideal: list[str]) -> tuple[list[str], str]:
    """The thoughts of one way to solve a story, and its deep reasoning, from the ideal thoughts."""
    rate, thoughts, due = rng.choice(THINKS), [], []  # due: steps that nothing has worked out yet
    for thought in ideal:
        if thought == SKIP:
            thoughts.append(NOTHING if rng.random() < IDLE else SKIP)
            continue
        due.append(thought)
        done, due = (due[:CATCH_UP], due[CATCH_UP:]) if rng.random() < rate else ([], due)
        thoughts.append(" ".join(done) or SKIP)
    if rng.random() < AGAIN:
        due = [thought for thought in ideal if thought != SKIP]
    return thoughts, " ".join(due)


def _pad(rng: random.Random, rate: float, before: list[str], step: str, after: list[str]) -> str:
    def some(parts: list[str]) -> list[str]:
        return [part for part in parts if rng.random() < rate]

    return " ".join([*some(before), step, *some(after)])
