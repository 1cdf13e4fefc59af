"""Layouts: the golden mask of docs/specification.md, 3.2; random ones against an oracle that loops
over every pair; other schedules."""

import numpy as np
import pytest
import torch

from rollouts.layout import Layout, arrange, batch, from_visible, grouped


def oracle(source, targets):
    """Mask and positions of `grouped`, from the definition: pair by pair, segment by segment."""
    count, length = sum(source), sum(source) + sum(targets)
    owner = [j for j, size in enumerate(targets) for _ in range(size)]
    mask = np.zeros((length, length), dtype=bool)
    for row in range(length):
        for column in range(length):
            if column >= count or row < count:
                mask[row, column] = row >= column
            else:
                token = row - count
                # of the token that the row predicts
                segment = owner[min(token + 1, len(owner) - 1)]
                mask[row, column] = column < sum(source[: segment + 1])
    return mask, [*range(count), *range(sum(targets))]


def test_the_golden_mask():
    source, target = [2, 2, 3], [1, 2, 2, 2]
    layout = grouped(source, target)
    assert layout.visible.tolist() == [4, 4, 7, 7, 7, 7, 7]
    before = np.repeat([2, 4, 7, 7], target)
    assert before.tolist() == [2, 4, 4, 7, 7, 7, 7]
    assert from_visible(7, before).visible.tolist() == layout.visible.tolist()
    assert layout.positions().tolist() == [*range(7), *range(7)]
    assert grouped(source, target, offset=5).positions().tolist() == [*range(7), *range(5, 12)]


@pytest.mark.parametrize("seed", range(40))
def test_random_segmentations_against_the_oracle(seed):
    rng = np.random.default_rng(seed)
    source = rng.integers(1, 6, rng.integers(1, 7)).tolist()
    target = rng.integers(1, 6, rng.integers(1, len(source) + 3)).tolist()
    mask, positions = oracle(source, target)
    layout = grouped(source, target)
    np.testing.assert_array_equal(layout.mask(), mask)
    assert layout.positions().tolist() == positions
    assert layout.length == len(positions) and layout.mask().any(1).all()


def test_read_first_sees_the_whole_source():
    mask = batch(4, 3).mask()
    assert mask[4:, :4].all() and not mask[:4, 4:].any()
    np.testing.assert_array_equal(mask[4:, 4:], np.tri(3, dtype=bool))
    np.testing.assert_array_equal(mask[:4, :4], np.tri(4, dtype=bool))


def test_a_layout_without_a_target_is_plain_causal():
    np.testing.assert_array_equal(Layout(6).mask(), np.tri(6, dtype=bool))
    assert Layout(6).positions().tolist() == list(range(6))


@pytest.mark.parametrize("wait", [1, 3, 8])
def test_wait_k_is_a_schedule_like_any_other(wait):
    source, words = 6, 9
    layout = from_visible(source, [min(wait + j, source) for j in range(words)])
    for row in range(words):
        seen = layout.mask()[source + row]
        assert seen[:source].sum() == min(wait + min(row + 1, words - 1), source)
        assert seen[source:].tolist() == [column <= row for column in range(words)]


def test_views_see_the_source_and_themselves():
    schedule, source, offset = [1, 2, 2, 4], 5, 2
    both = from_visible(source, [source] * 4 + schedule, offset, [0] * 4 + [1] * 4)
    for view, visible in enumerate(([source] * 4, schedule)):
        alone = from_visible(source, visible, offset)
        rows = [*range(source), *range(source + 4 * view, source + 4 * view + 4)]
        np.testing.assert_array_equal(both.mask()[np.ix_(rows, rows)], alone.mask())
        assert both.positions()[rows].tolist() == alone.positions().tolist()
    first, second = slice(source, source + 4), slice(source + 4, None)
    assert not both.mask()[first, second].any() and not both.mask()[second, first].any()


def test_a_schedule_cannot_see_more_than_there_is():
    with pytest.raises(ValueError, match="1 to 4 of 3 source tokens"):
        from_visible(3, [1, 4])


def test_a_long_layout_is_built_without_python_loops():
    lengths = [10] * 400
    mask = grouped(lengths, lengths).mask()
    assert mask.shape == (8000, 8000) and torch.from_numpy(mask).sum() == (
        8 * 10**6
        + 2000
        + 8 * 10**6
        + 2000
        + sum(10 * min(10 * (j + 1), 4000) for j in range(400))
        + 10 * 399
    )


SEGMENTS, OPENING, WRITTEN = (
    [[1, 2], [3], [4, 5], [6]],
    [[10], [11, 12]],
    [[20, 21], [22], [30, 31, 32]],
)


def test_what_was_read_and_written_is_laid_out():
    fields = arrange("grouped", SEGMENTS, OPENING, WRITTEN, [True, False, False], offset=3)
    assert fields["prompt_ids"] == [1, 2, 3, 4, 5, 6]
    assert fields["completion_ids"] == [10, 11, 12, 20, 21, 22, 30, 31, 32]
    assert fields["slots"].tolist() == [-1, -1, -1, 0, 0, 1, 2, 2, 2]
    assert fields["sampled"].tolist() == [False, False, False, True, False, True, True, True, True]
    expected = grouped([2, 1, 2, 1], [1, 2, 2, 1, 3], 3)
    np.testing.assert_array_equal(fields["layout"].table(), expected.table())
    assert fields["layout"].offset == 3
    np.testing.assert_array_equal(
        arrange("batch", SEGMENTS, OPENING, WRITTEN)["layout"].mask(), batch(6, 9).mask()
    )


def test_interleaved_tokens_are_in_order_of_arrival():
    fields = arrange("interleaved", SEGMENTS, OPENING, WRITTEN, [True, False, False])
    assert fields["prompt_ids"] == [1, 2, 10, 3, 11, 12, 4, 5] and fields["layout"] is None
    assert fields["completion_ids"] == [20, 21, 6, 22, 30, 31, 32]
    assert fields["slots"].tolist() == [0, 0, -1, 1, 2, 2, 2]
    assert fields["sampled"].tolist() == [True, False, False, True, True, True, True]


def test_a_target_opens_with_a_forced_token():
    with pytest.raises(ValueError, match="starts with a forced token"):
        arrange("grouped", SEGMENTS, [], WRITTEN)


def test_nothing_to_think_about_between_reading_and_answering():
    for kind, prompt in (("grouped", [1, 2]), ("interleaved", [1, 2, 10, 11])):
        fields = arrange(kind, [[1, 2]], [[10], [11]], [[30, 31]])
        assert fields["prompt_ids"] == prompt and fields["slots"][-2:].tolist() == [0, 0]
