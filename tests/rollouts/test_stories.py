import os
import re
import subprocess
import sys

import pytest

from recipes.errors import DataError
from rollouts.data.stories import CATCH_UP, DISTRACTORS, NOTHING, stories, story

STEP = re.compile(r"(\d+) ([+*/-]) (\d+) = (\d+)\.")
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
# What a story sentence does to the number, read from its wording and not from the generator's
# tables.
WORDING = {
    "+": r"(?:finds|buys|wins) (\d+) more\.|gets (\d+) from",
    "-": r"(?:gives|loses|sells|throws) (\d+)",
    "*": r"(\d+) times as many",
}


def chain(made):
    """Start number and operations as the story's own sentences tell them."""
    start, *rest = made.sentences
    found = [int(re.search(r"has (\d+) ", start)[1])]
    for sentence in rest:
        matches = {sign: re.search(pattern, sentence) for sign, pattern in WORDING.items()}
        ((sign, match),) = [(sign, match) for sign, match in matches.items() if match]
        found.append((sign, int(next(filter(None, match.groups())))))
    return tuple(found)


@pytest.mark.parametrize("difficulty", [1, 3, 5])
@pytest.mark.parametrize("verbose", [False, True])
def test_the_solution_is_the_arithmetic_of_the_sentences(difficulty, verbose):
    for index in range(1500):
        made = story(7, index, "train", difficulty, verbose)
        value, *operations = chain(made)
        assert 1 <= len(operations) <= difficulty and len(made.thoughts) == len(made.sentences)
        assert f"Start: {value}." in made.thoughts[0]
        numbers = [value]
        for (sign, n), thought in zip(operations, made.thoughts[1:], strict=True):
            after = OPERATIONS[sign](value, n)
            assert f"{value} {sign} {n} = {after}." in thought
            numbers += [n, value := after]
        assert made.answer == str(value) and made.solution.endswith(
            f"The answer is \\boxed{{{value}}}."
        )
        assert all(0 <= number <= (99 if difficulty < 4 else 999) for number in numbers)
        assert difficulty >= 4 or "*" not in made.solution
        for a, sign, b, c in STEP.findall(made.solution):  # the checks of a verbose solution too
            assert OPERATIONS[sign](int(a), int(b)) == int(c)


def test_form():
    made = next(s for s in (story(0, i, "train", 2) for i in range(99)) if len(s.sentences) == 3)
    start = int(re.search(r"\d+", made.sentences[0])[0])
    name, item = re.fullmatch(rf"(\w+) has {start} (\w+)\.", made.sentences[0]).groups()
    assert made.question == f"How many {item} does {name} have now?"
    assert made.prompt == " ".join(made.sentences) + " " + made.question
    step = r"\d+ [+-] \d+ = \d+\. "
    assert re.fullmatch(
        rf"Start: {start}\. {step}{step}The answer is \\boxed\{{\d+\}}\.", made.solution
    )


def test_every_small_number_and_every_length_occurs():
    made = [story(0, i, "train", 3) for i in range(5000)]
    assert {int(n) for s in made for n in re.findall(r"\d+", s.prompt + s.solution)} == set(
        range(100)
    )
    for length in (2, 3, 4):
        assert 0.3 < sum(len(s.sentences) == length for s in made) / len(made) < 0.37
    hard = [story(0, i, "train", 4) for i in range(2000)]
    assert {n for s in hard for sign, n in chain(s)[1:] if sign == "*"} == {2, 3, 4, 5}
    assert max(int(s.answer) for s in hard) > 900


def test_splits_share_no_problem():
    train = {
        chain(story(seed, i, "train", d)) for seed, d in ((0, 3), (1, 1)) for i in range(10000)
    }
    heldout = {
        chain(s)
        for seed, d in ((0, 3), (5, 1))
        for s in stories(1000, seed=seed, split="heldout", difficulty=d)
    }
    validation = {
        chain(s)
        for seed, d in ((0, 3), (5, 1))
        for s in stories(1000, seed=seed, split="validation", difficulty=d)
    }
    assert len(train) > 9000 and len(heldout) > 1200 and len(validation) > 1000
    assert not train & heldout and not train & validation and not validation & heldout


def test_ten_to_twenty_percent_of_the_chains_are_held_out():
    # Chains of one operation: from 2 to 99, by at most 20, not below 0 nor above 99.
    everything = sum(
        1
        for start in range(2, 100)
        for n in range(1, 21)
        for end in (start + n, start - n)
        if 0 <= end <= 99
    )
    heldout = {chain(s) for s in stories(2000, seed=0, split="heldout", difficulty=1)}
    assert 0.10 < len(heldout) / everything < 0.20


def test_heldout_stories_are_distinct_while_enough_exist():
    many = stories(450, seed=3, split="heldout", difficulty=1)
    assert len({chain(s) for s in many}) == 450
    assert stories(50, seed=3, split="heldout", difficulty=1) == many[:50]
    more = stories(700, seed=3, split="heldout", difficulty=1)
    assert len(more) == 700 and len({chain(s) for s in more}) < 700 and more[:450] == many


def test_verbose_tells_the_same_story_at_greater_and_varying_length():
    pairs = [(story(0, i, "train", 3), story(0, i, "train", 3, verbose=True)) for i in range(300)]
    for terse, verbose in pairs:
        assert (terse.prompt, terse.answer) == (verbose.prompt, verbose.answer)
        assert all(
            short in long for short, long in zip(terse.thoughts, verbose.thoughts, strict=True)
        )
    ratio = sum(len(v.solution) for _, v in pairs) / sum(len(t.solution) for t, _ in pairs)
    assert ratio > 2
    assert {"Check: " in v.solution for _, v in pairs} == {True, False}


def relevant(made):
    """Sentences and thoughts without those of distractors."""
    plain = re.compile(
        "|".join(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(text)) for text in DISTRACTORS)
    )
    kept = [
        pair
        for pair in zip(made.sentences, made.thoughts, strict=True)
        if not plain.fullmatch(pair[0])
    ]
    return [sentence for sentence, _ in kept], [thought for _, thought in kept]


def test_distractors_change_nothing():
    counts = []
    for index in range(600):
        plain, made = story(0, index, "train", 3), story(0, index, "train", 3, distractors=2)
        sentences, thoughts = relevant(made)
        assert (tuple(sentences), tuple(thoughts)) == (plain.sentences, plain.thoughts)
        assert (made.question, made.solution, made.answer) == (
            plain.question,
            plain.solution,
            plain.answer,
        )
        item = made.question.split()[2]
        others = [s for s, thought in zip(made.sentences, made.thoughts) if thought == "<skip>"]
        assert len(others) == len(made.sentences) - len(sentences) and not any(
            item in other for other in others
        )
        counts.append(len(others))
    assert all(150 < counts.count(n) < 250 for n in (0, 1, 2)) and set(counts) == {0, 1, 2}
    told = {
        re.sub(r"\d+", "N", s)
        for i in range(600)
        for s in story(0, i, "train", 3, distractors=2).sentences
    }
    assert {"The sun is shining.", "It is N degrees outside.", "The dog is asleep."} <= told


def test_varied_solutions_work_out_each_step_in_order_now_or_later():
    shares, idle, again = [], 0, 0
    for index in range(1500):
        ideal = story(0, index, "train", 3, distractors=2)
        made = story(0, index, "train", 3, distractors=2, varied=True)
        assert (made.sentences, made.prompt, made.answer) == (
            ideal.sentences,
            ideal.prompt,
            ideal.answer,
        )
        steps = [thought for thought in ideal.thoughts if thought != "<skip>"]
        written = [thought for thought in made.thoughts if thought not in ("<skip>", NOTHING)]
        assert all(len(re.findall(r"Start|=", thought)) <= CATCH_UP for thought in written)
        early, full = " ".join(written), " ".join(steps)
        assert made.deep == full or " ".join(filter(None, (early, made.deep))) == full
        for place, thought in enumerate(made.thoughts):  # nothing is worked out before it was read
            known = " ".join(t for t in ideal.thoughts[: place + 1] if t != "<skip>")
            assert thought in ("<skip>", NOTHING) or thought in known
        shares.append(len(early) / len(full))
        idle += NOTHING in made.thoughts
        again += bool(early) and made.deep == full
    assert idle > 100 and again > 100
    assert (
        50 < shares.count(0) < 200
        and shares.count(1) > 600
        and sum(0 < share < 1 for share in shares) > 200
    )


def test_random_access_is_the_same_in_every_process():
    expected = [
        story(3, i, split, 4, True).solution for split in ("train", "heldout") for i in (9, 2)
    ]
    code = (
        "from rollouts.data.stories import story\n"
        "print([story(3, i, s, 4, True).solution for s in ('train', 'heldout') for i in (9, 2)])"
    )
    for hash_seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        printed = subprocess.check_output([sys.executable, "-c", code], text=True, env=env)
        assert printed.strip() == repr(expected)
    assert story(3, 2, "train", 3) != story(4, 2, "train", 3)


def test_the_heldout_set_is_fixed():
    # Results are comparable only while the same chains are held out, and drawn in the same order.
    assert [" ".join(s.thoughts) for s in stories(3, seed=0, split="heldout", difficulty=3)] == [
        "Start: 32. 32 - 14 = 18. 18 + 10 = 28. 28 + 3 = 31.",
        "Start: 65. 65 + 11 = 76. 76 - 14 = 62.",
        "Start: 72. 72 - 20 = 52. 52 - 17 = 35.",
    ]


@pytest.mark.parametrize(
    "split, difficulty, said", [("test", 3, "split 'test'"), ("train", 0, "data.difficulty")]
)
def test_errors(split, difficulty, said):
    with pytest.raises(DataError, match=said) as error:
        story(0, 0, split, difficulty)
    assert "\n" not in str(error.value)
