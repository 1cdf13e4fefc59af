from itertools import combinations

import pytest

from rewards.metrics.pass_at_k import avg_at_k, pass_at_k


def test_avg_at_k_weighs_prompts_equally():
    assert avg_at_k([[True, False], [True, True]]) == 0.75
    assert avg_at_k([[True], [False, False, False]]) == 0.5


def test_pass_at_k_is_the_share_of_subsets_with_a_success():
    rows = [
        [True, False, False, True, False],
        [False] * 5,
        [True] * 5,
        [False, False, True, False, False],
    ]
    for k in range(1, 6):
        by_counting = [sum(map(any, s)) / len(s) for s in ([*combinations(row, k)] for row in rows)]
        assert pass_at_k(rows, k) == pytest.approx(sum(by_counting) / 4, abs=1e-12)
    assert pass_at_k(rows, 1) == pytest.approx(avg_at_k(rows))


def test_pass_at_k_of_many_completions():
    n = 1000
    row = [True] * 3 + [False] * (n - 3)
    k = 500  # 1 - C(997, 500) / C(1000, 500); the binomials are far beyond a float
    left_out = 1.0
    for i in range(3):
        left_out *= (n - k - i) / (n - i)
    assert pass_at_k([row], k) == pytest.approx(1 - left_out, rel=1e-12)
    assert pass_at_k([row], n) == 1.0 and pass_at_k([[False] * n], n) == 0.0


@pytest.mark.parametrize(
    "correct, k, said",
    [
        ([[True, False], [True]], 2, "needs 2 completions of each prompt; one has 1"),
        ([], 1, "at least one prompt"),
        ([[True]], 0, "k of 1 or more"),
    ],
)
def test_pass_at_k_errors(correct, k, said):
    with pytest.raises(ValueError, match=said):
        pass_at_k(correct, k)


@pytest.mark.parametrize("correct", [[], [[True], []]])
def test_avg_at_k_errors(correct):
    with pytest.raises(ValueError, match="avg@k needs"):
        avg_at_k(correct)
