"""The simulated wait for an answer, against cases worked out by hand and the clock written out."""

import numpy as np
import pytest

from rewards.metrics.latency import answer_latency, to_answer


@pytest.mark.parametrize(
    "words, tokens, per_word, per_token, expected",
    [
        # Faster than the reader: thoughts 2.0-2.3 and 4.0-4.2, deep to 5.2; the last word came at
        # 4.0.
        ([5, 5], [3, 2, 10], 0.4, 0.1, 1.2),
        # Slower: thoughts 2-5 and 5-7 (its sentence came at 4), deep to 11.
        ([5, 5], [3, 2, 4], 0.4, 1.0, 7.0),
        # A backlog that a long sentence makes up for: 1-3, 3-5, 7.0-7.2, deep to 7.7; the last word
        # at 7.
        ([2, 2, 10], [20, 20, 2, 5], 0.5, 0.1, 0.7),
        # The same backlog with a short last sentence: 1-3, 3-5, 5.0-5.2, deep to 5.7; the last word
        # at 3.
        ([2, 2, 2], [20, 20, 2, 5], 0.5, 0.1, 2.7),
        # A pause in between and a backlog after it: 1.0-1.1, 11-14, 14-16, deep to 16.5; the last
        # word at 12.
        ([2, 20, 2], [1, 30, 20, 5], 0.5, 0.1, 4.5),
    ],
)
def test_by_hand(words, tokens, per_word, per_token, expected):
    assert answer_latency(words, tokens, per_word, per_token) == pytest.approx(expected)
    whole = sum(tokens) * per_token  # read first: nothing overlaps with the reading
    assert answer_latency(words, tokens, per_word, per_token, read_first=True) == pytest.approx(
        whole
    )


def test_against_the_clock():
    rng = np.random.default_rng(0)
    for _ in range(200):
        words = rng.integers(1, 20, rng.integers(1, 8))
        tokens = rng.integers(1, 30, len(words) + 1)
        per_word, per_token = rng.random(2) * [1.0, 0.5]
        now = read = 0.0
        for sentence, thought in zip(words, tokens):
            read += sentence * per_word
            now = max(now, read) + thought * per_token
        expected = now + tokens[-1] * per_token - read
        assert answer_latency(words, tokens, per_word, per_token) == pytest.approx(expected)


def test_the_answer_starts_after_the_end_of_the_reasoning():
    assert to_answer([4, 4, 9, 5, 6], eor=9) == 4
    assert to_answer([9, 5], eor=9) == 2
    assert to_answer([4, 4, 9], eor=9) == 3  # cut before its answer
    assert to_answer([4, 4, 5], eor=9) == 3
