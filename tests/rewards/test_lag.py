"""Lag of a written text: cases worked out by hand, closed forms of known policies, SimulEval's
corner cases."""

import numpy as np
import pytest

from rewards.metrics.lag import ail, average_lagging, laal, lags, rco


def wait(k: int, source: int, length: int) -> list[int]:
    """Delays of wait-k: k units are read before the first word, one more before each further
    word."""
    return [min(k + t, source) for t in range(length)]


def simuleval(delays, source, length) -> float:
    """The published formula, word by word: the sum ends with the first word written when all was
    read."""
    if delays[0] > source:
        return delays[0]
    total = 0.0
    for tau, delay in enumerate(delays, 1):
        total += delay - (tau - 1) * source / length
        if delay >= source:
            break
    return total / tau


def test_by_hand():
    # M = 6, L = 4, three words in the reference, which is 2 units a word for AL and 1.5 for LAAL
    # and AIL.
    delays = [2, 3, 6, 6]
    assert rco(delays, 6) == pytest.approx(17 / 24)
    # (2 - 0) + (3 - 1.5) + (6 - 3) + (6 - 4.5) = 8
    assert ail(delays, 6) == pytest.approx(8 / 4)
    # Until the third word, the first with all 6 read: (2 - 0) + (3 - 2) + (6 - 4) = 5
    assert average_lagging(delays, 6, 3) == pytest.approx(5 / 3)
    # The text is the longer one: (2 - 0) + (3 - 1.5) + (6 - 3) = 6.5
    assert laal(delays, 6, 3) == pytest.approx(6.5 / 3) == average_lagging(delays, 6)
    # The reference is the longer one, 8 words of 0.75 units: (2 - 0) + (3 - 0.75) + (6 - 1.5) =
    # 8.75
    assert laal(delays, 6, 8) == average_lagging(delays, 6, 8) == pytest.approx(8.75 / 3)
    assert lags(delays, 6, 3) == pytest.approx(
        {"rco": 17 / 24, "ail": 2, "al": 5 / 3, "laal": 6.5 / 3}
    )


@pytest.mark.parametrize("k, n", [(1, 1), (1, 9), (3, 9), (8, 9), (9, 9)])
def test_wait_k_lags_k_behind_a_text_of_equal_length(k, n):
    delays = wait(k, n, n)
    assert average_lagging(delays, n, n) == laal(delays, n, n) == pytest.approx(k)
    # The last k - 1 words wait for nothing, which AIL counts: they lag k - 1, k - 2, .. 1 units
    # behind.
    assert ail(delays, n) == pytest.approx((k * (n - k + 1) + k * (k - 1) / 2) / n)
    assert rco(delays, n) == pytest.approx(1 - (n - k) * (n - k + 1) / (2 * n * n))


@pytest.mark.parametrize("source, length, reference", [(1, 1, 1), (7, 3, 5), (7, 12, 5)])
def test_a_text_written_after_all_was_read_lags_by_the_whole_source(source, length, reference):
    lag = lags([source] * length, source, reference)
    assert lag["al"] == lag["laal"] == source and lag["rco"] == 1
    assert lag["ail"] == pytest.approx(source * (length + 1) / (2 * length))


def test_corner_cases_of_simuleval():
    # A first delay after the end of the source (times may pass it) is the result.
    assert average_lagging([9, 11], 6, 2) == laal([9, 11], 6, 2) == 9
    # A later one ends the sum like one at the end: (2 - 0) + (8 - 3) = 7
    assert average_lagging([2, 8, 9], 6, 2) == pytest.approx(7 / 2)
    # The end of the source is never read: all words count, (1 - 0) + (2 - 2) + (3 - 4) = 0
    assert average_lagging([1, 2, 3], 6, 3) == pytest.approx(0)
    # Words written before anything was read, and a single word.
    assert average_lagging([0, 0], 6, 2) == pytest.approx(-1.5) and average_lagging([4], 6, 5) == 4
    # A text far longer than the reference is rewarded by AL alone.
    delays = wait(2, 6, 18)
    assert average_lagging(delays, 6, 2) < 0 < laal(delays, 6, 2)


def test_against_the_formula_and_the_bounds():
    rng = np.random.default_rng(0)
    for _ in range(300):
        source, length, reference = rng.integers(1, 15, 3)
        delays = np.sort(rng.integers(0, source + 1, length))
        lag = lags(delays, source, reference)
        assert lag["al"] == pytest.approx(simuleval(delays, source, reference))
        assert lag["laal"] == pytest.approx(simuleval(delays, source, max(length, reference)))
        assert lag["al"] <= lag["laal"] + 1e-9 and lag["laal"] <= source and 0 <= lag["rco"] <= 1
        late = np.sort(np.append(delays, source))[1:]  # each word at the delay of the next one
        assert rco(late, source) >= lag["rco"] and ail(late, source) >= lag["ail"]
        scaled = lags(10 * delays, 10 * source, reference)  # units ten times as small
        assert scaled == pytest.approx(
            {key: value * (1 if key == "rco" else 10) for key, value in lag.items()}
        )


@pytest.mark.parametrize(
    "delays, source, said",
    [
        ([], 5, "at least one target word and a source, not 0 words of a source of 5"),
        ([1], 0, "not 1 words of a source of 0"),
        ([1, 3, 2], 5, "never decrease: word 3 has 2 after 3"),
        ([-1, 3], 5, "must be 0 or more and never decrease: word 1 has -1"),
        ([1, float("nan")], 5, "never decrease: word 2 has nan after 1"),
        ([1, 6], 5, "must not pass the source of 5 units: word 2 has 6 after 1"),
    ],
)
def test_errors(delays, source, said):
    for call in (rco, ail, lambda *arguments: lags(*arguments, 3)):
        with pytest.raises(ValueError, match=said) as error:
            call(delays, source)
        assert "\n" not in str(error.value)
    if "pass the source" not in said:
        for call in (average_lagging, lambda *arguments: laal(*arguments, 3)):
            with pytest.raises(ValueError, match=said):
                call(delays, source)


def test_a_reference_without_words():
    with pytest.raises(ValueError, match="a reference of 1 word or more, not 0"):
        average_lagging([1, 2], 2, 0)
    assert laal([1, 2], 2, 0) == average_lagging([1, 2], 2)  # the text written is the longer one
