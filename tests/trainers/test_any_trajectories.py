"""Whatever the trajectories are: packing loses nothing, and micro-batches keep to their budget."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.errors import AnnotationError
from rollouts.trajectory import ANNOTATIONS, Trajectory
from trainers.core.batching import (
    assign,
    empty_like,
    make_microbatches,
    pack,
    shard_by_tokens,
    unpack,
)

CPU = torch.device("cpu")
IDS = st.integers(0, 99)
LENGTHS = st.lists(st.integers(1, 50), max_size=30)


@st.composite
def batches(draw):
    """Trajectories with the same annotations, and some of their indices in any order."""
    names = draw(st.lists(st.sampled_from(sorted(ANNOTATIONS)), unique=True, max_size=6))
    wide = {name: draw(st.sampled_from([(), (), (3,), (2, 2)])) for name in names}
    trajectories = []
    for index in range(draw(st.integers(1, 6))):
        prompt = draw(st.lists(IDS, min_size=1, max_size=5))
        completion = draw(st.lists(IDS, max_size=6))
        trajectory = Trajectory(index, 0, prompt, completion, "stop")
        draws = np.random.default_rng(draw(st.integers(0, 2**32)))
        for name in names:
            shape = () if name == "targets" else wide[name]
            values = draws.normal(0, 9, (len(completion), *shape))
            trajectory.annotations[name] = values.astype(ANNOTATIONS[name].dtype)
        trajectories.append(trajectory)
    members = draw(st.lists(st.sampled_from(range(len(trajectories))), min_size=1, unique=True))
    return trajectories, members


@given(batches())
def test_what_is_packed_comes_out_as_it_went_in(drawn):
    trajectories, members = drawn
    batch = pack(trajectories, members, CPU)
    packed = [trajectories[member] for member in members]
    assert batch.input_ids[0].tolist() == [i for t in packed for i in t.token_ids]
    assert batch.bounds == np.cumsum([0, *(t.length for t in packed)]).tolist()
    # Each target is predicted by the token before it, which is of the same sequence.
    sampled = [i for t in packed for i in t.completion_ids]
    assert batch.input_ids[0, batch.rows + 1].tolist() == sampled
    assert (batch.position_ids[0, batch.rows + 1] > 0).all()
    targets = [t.annotations.get("targets", np.array(t.completion_ids)) for t in packed]
    assert batch.targets.tolist() == np.concatenate(targets).tolist()
    for name, tensor in batch.annotations.items():
        for trajectory, array in zip(packed, unpack(batch, trajectories, tensor), strict=True):
            given_array = trajectory.annotations[name]
            assert array.dtype == given_array.dtype
            np.testing.assert_array_equal(array, given_array)
    empty = empty_like(batch)
    assert not any(tensor.any() for tensor in empty.annotations.values())
    assert unpack(empty, trajectories, empty.targets) == []


@given(LENGTHS, st.integers(1, 60))
def test_microbatches_hold_each_sequence_once_within_the_budget(lengths, budget):
    groups = make_microbatches(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert sum(lengths[index] for index in group) <= budget or len(group) == 1
    # First fit leaves at most one micro-batch half empty.
    half = [group for group in groups if 2 * sum(lengths[index] for index in group) <= budget]
    assert len(half) <= 1


@given(LENGTHS, st.integers(1, 8))
def test_ranks_get_each_sequence_once_and_none_is_left_without(lengths, ranks):
    shares = assign(lengths, ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(lengths)))
    trajectories = [Trajectory(i, 0, [1] * n, [], "length") for i, n in enumerate(lengths)]
    shards = [shard_by_tokens(trajectories, rank, ranks) for rank in range(ranks)]
    own = [t.prompt_index for shard in shards for t in shard if not t.padding]
    assert sorted(own) == list(range(len(lengths)))
    assert all(shards) or not lengths


@given(st.sampled_from(["logprobs", "sampled", "slots", "reads"]), st.integers(0, 4))
def test_an_array_of_another_length_is_refused(name, length):
    arrays = {name: np.zeros(length)}
    if length == 2:
        assert len(getattr(Trajectory(0, 0, [1], [2, 3], "stop", **arrays), name)) == 2
        return
    with pytest.raises(AnnotationError, match=f"`{name}` has {length} entries for 2 completion"):
        Trajectory(0, 0, [1], [2, 3], "stop", **arrays)


def test_a_prompt_and_annotations_of_the_right_length_are_needed():
    with pytest.raises(AnnotationError, match="prompt 7: a trajectory without a prompt"):
        Trajectory(7, 0, [], [2, 3], "stop")
    short, long = (Trajectory(i, 0, [1], [2, 3], "stop") for i in range(2))
    short.annotations["mask"] = np.ones(1, bool)
    long.annotations["mask"] = np.ones(3, bool)
    # Together they have as many entries as tokens.
    with pytest.raises(AnnotationError, match="prompt 0: annotation 'mask' has 1 entries for 2"):
        pack([short, long], [0, 1], CPU)
