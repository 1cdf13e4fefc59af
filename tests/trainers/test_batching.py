"""Packing: every token once, budgets kept, what goes in comes out."""

import numpy as np
import pytest
import torch

from rollouts.trajectory import Trajectory
from trainers.core.batching import assign, empty_like, make_microbatches, pack, unpack
from trainers.core.updates import normalize


def some_trajectories(count=40, seed=0):
    rng = np.random.default_rng(seed)
    trajectories = []
    for index in range(count):
        completion = rng.integers(3, 99, rng.integers(1, 30)).tolist()
        prompt = rng.integers(3, 99, rng.integers(1, 30)).tolist()
        trajectory = Trajectory(index, 0, prompt, completion, "stop")
        trajectory.annotations = {
            "mask": rng.random(len(completion)) > 0.2,
            "wide": rng.random((len(completion), 3)).astype(np.float32),
        }
        trajectories.append(trajectory)
    return trajectories


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_sequence_goes_to_one_rank_and_loads_are_even(ranks):
    lengths = [t.length for t in some_trajectories()]
    shares = assign(lengths, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)


def test_microbatches_keep_the_budget_and_an_overlong_sequence_is_alone():
    lengths = [10, 90, 30, 200, 60, 50, 5]
    groups = make_microbatches(lengths, 100)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert sum(lengths[i] for i in group) <= 100 or group == [3]


def test_packing_puts_each_target_next_to_the_row_that_predicts_it():
    trajectories = some_trajectories()
    batch = pack(trajectories, [3, 0, 7], torch.device("cpu"))
    assert batch.input_ids[0].tolist() == [i for m in (3, 0, 7) for i in trajectories[m].token_ids]
    assert batch.targets.tolist() == [i for m in (3, 0, 7) for i in trajectories[m].completion_ids]
    assert torch.equal(batch.input_ids[0, batch.rows + 1], batch.targets)
    assert torch.equal(batch.position_ids[0, batch.rows + 1], batch.position_ids[0, batch.rows] + 1)
    assert batch.bounds == np.cumsum([0] + [trajectories[m].length for m in (3, 0, 7)]).tolist()


def test_unpack_is_the_inverse_of_pack():
    trajectories = some_trajectories()
    batch = pack(trajectories, [5, 1, 9], torch.device("cpu"))
    for member, wide in zip(batch.members, unpack(batch, trajectories, batch.annotations["wide"])):
        np.testing.assert_array_equal(wide, trajectories[member].annotations["wide"])


def test_an_empty_microbatch_counts_for_nothing():
    batch = empty_like(pack(some_trajectories(), [0, 1], torch.device("cpu")))
    assert not batch.mask.any() and batch.members == []


def test_a_microbatch_without_an_unmasked_token_does_not_count_in_the_divisor():
    drawn = some_trajectories(3)
    drawn[1].annotations["mask"][:] = False
    # Another rank has one micro-batch, of a sequence that stands in.
    gather = lambda own: [own, (1, 0, 0, 0, 0)]  # noqa: E731
    tokens = sum(int(t.annotations["mask"].sum()) for t in drawn)
    total, filled, rounds = normalize(drawn, "microbatch_token_mean", [[0], [1], [2]], gather)
    assert (total, filled, rounds) == (tokens, 2, 3)
