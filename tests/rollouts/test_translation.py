"""The generated translation: its rules, its schedule against a search over all sentences, its
splits, its data set."""

import os
import subprocess
import sys
from collections import Counter
from itertools import chain, permutations, product, takewhile

import pytest

from recipes.errors import DataError
from rollouts.data.load import load_examples
from rollouts.data.translation import MODIFIERS, NOUNS, ideal_schedule, translation


def phrases(source):
    """A source cut after its nouns."""
    found = [[]]
    for word in source.split():
        found[-1].append(word)
        if word in NOUNS:
            found.append([])
    assert found.pop() == []
    return found


def translate(source):
    """The rules, written down once more: each phrase from its last word to its first."""
    words = NOUNS | MODIFIERS
    return [words[word] for phrase in phrases(source) for word in phrase[::-1]]


def test_the_words():
    target = [*NOUNS.values(), *MODIFIERS.values()]
    every = [*NOUNS, *MODIFIERS, *target]
    assert len(NOUNS) == 24 and len(MODIFIERS) == 36 and len(set(every)) == 120
    assert not any(a != b and a.startswith(b) for a in every for b in every)
    assert all(word.isalpha() and word.isascii() and word.islower() for word in every)


def test_sentences_follow_the_rules():
    modifiers, lengths = Counter(), Counter()
    for index in range(3000):
        made = translation(3, index, "train")
        cut = phrases(made.source)
        assert made.target.split() == translate(made.source)
        assert made.schedule == ideal_schedule(made.source) and len(made.schedule) == len(
            made.target.split()
        )
        assert all(len(set(phrase)) == len(phrase) for phrase in cut)
        modifiers.update(len(phrase) - 1 for phrase in cut)
        lengths[len(cut)] += 1
    assert set(lengths) == {3, 4, 5, 6, 7} and all(500 < count < 700 for count in lengths.values())
    shares = [modifiers[count] / modifiers.total() for count in range(5)]
    assert modifiers.total() == sum(modifiers[count] for count in range(5))
    assert shares == pytest.approx([0.62, 0.14, 0.08, 0.08, 0.08], abs=0.015)


def common_prefix(words, others):
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(words, others))
    return [word for word, _ in pairs]


def test_the_schedule_is_the_shortest_source_that_determines_the_target():
    """Over every sentence of a smaller language: what all the sentences that go on alike have in
    common."""
    nouns, modifiers = list(NOUNS)[:2], list(MODIFIERS)[:2]
    every = [
        [*before, noun]
        for count in range(3)
        for before in permutations(modifiers, count)
        for noun in nouns
    ]
    sentences = [
        list(chain(*chosen)) for count in (2, 3, 4) for chosen in product(every, repeat=count)
    ]
    common: dict = {}  # by the words read: the target words that are the same in all sentences
    for words in sentences:
        target = translate(" ".join(words))
        for read in range(len(words) + 1):
            key = tuple(words[:read])
            common[key] = common_prefix(common.get(key, target), target)
    assert len(sentences) == 11100
    for words in sentences:
        known = [len(common[tuple(words[:read])]) for read in range(len(words) + 1)]
        shortest = tuple(
            next(read for read, count in enumerate(known) if count > t) for t in range(len(words))
        )
        assert ideal_schedule(" ".join(words)) == shortest


def test_a_schedule_by_hand():
    big, old, house, dog = *list(MODIFIERS)[:2], *list(NOUNS)[:2]
    assert ideal_schedule(f"{dog} {big} {old} {house} {big} {dog}") == (1, 4, 4, 4, 6, 6)
    assert ideal_schedule(f"{big} {house} {dog}") == (2, 2, 3) and ideal_schedule("") == ()


def test_splits_share_no_source():
    held_out = {translation(seed, i, "heldout").source for seed in (0, 1) for i in range(1000)}
    train = {seed: {translation(seed, i, "train").source for i in range(5000)} for seed in (0, 2)}
    assert len(held_out) > 1950 and min(map(len, train.values())) > 4950
    # short and bare sentences do come again: within a split, and only there
    assert train[0] & train[2]
    assert not (train[0] | train[2]) & held_out


def test_the_same_in_every_process_and_for_ever():
    assert (
        translation(0, 1, "heldout") == translation(0, 1, "heldout") != translation(1, 1, "heldout")
    )
    expected = [translation(5, i, split) for split in ("train", "heldout") for i in (0, 7)]
    code = (
        "from rollouts.data.translation import translation\n"
        "print([translation(5, i, s) for s in ('train', 'heldout') for i in (0, 7)])"
    )
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output(
        [sys.executable, "-c", code], text=True, env=env
    ).strip() == repr(expected)
    # Results are comparable only while these stay as they are.
    assert [translation(0, i, "heldout").source for i in range(2)] == [
        "nebi lage nuna soda gota",
        "nako bibe bodo tolo",
    ]
    made = translation(0, 3, "train")
    assert (made.source, made.target, made.schedule) == (
        "rula mosi neke seni lade kimo damo",
        "rarin fahun luros ruros riret livas felam",
        (1, 6, 6, 6, 6, 6, 7),
    )


def test_the_data_set():
    train = load_examples("translation", size=50, seed=4)
    made = translation(4, 49, "train")
    assert len(train) == 50 and train[-1] == train[49] and [e.index for e in train[48:]] == [48, 49]
    assert train[49].messages == [{"role": "user", "content": made.source}]
    assert train[49].answer == train[49].solution == made.target
    with pytest.raises(IndexError):
        train[50]
    held_out = load_examples("translation", split="heldout", size=50, limit=7, seed=4)
    assert [e.solution for e in held_out] == [translation(4, i, "heldout").target for i in range(7)]
    assert len(load_examples("translation")) == 20000


@pytest.mark.parametrize(
    "call, said",
    [
        (
            lambda: load_examples("translation", split="test"),
            "no split 'test'; use one of: train, heldout",
        ),
        (lambda: ideal_schedule(f"{next(iter(NOUNS))} horse"), "'horse' is no word"),
        (lambda: ideal_schedule(next(iter(MODIFIERS))), "has no noun"),
    ],
)
def test_errors(call, said):
    with pytest.raises(DataError, match=said) as error:
        call()
    assert "\n" not in str(error.value)
