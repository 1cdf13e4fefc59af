"""The work of one update: trajectories dealt to the ranks, and micro-batches with a divisor.

The loop and the conformance suite (trainers/conformance) both run what is here. `gather` brings the
ranks' values together. The suite plays several ranks in one process, so it gives another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from rollouts.trajectory import Trajectory
from trainers.core import distributed
from trainers.core.batching import (
    MicroBatch,
    empty_like,
    make_microbatches,
    pack,
    shard_by_tokens,
)

Gather = Callable[[Any], list[Any]]


def shards(
    trainer,
    trajectories: Sequence[Trajectory],
    count: int,
    rank: int | None = None,
    ranks: int | None = None,
) -> list[list[Trajectory]]:
    """A rank's annotated part of the kept trajectories, for each update of a step.

    A part is empty on all ranks where an update has no trajectory. All are annotated before the
    first update, by the policy that drew them.

    Args:
        trainer: a `Trainer`, which keeps and annotates.
        trajectories: of the step, the same on every rank.
        count: `train.minibatches`.
        rank, ranks: this rank, and how many there are. None: the process group's.
    """
    rank = distributed.rank() if rank is None else rank
    ranks = distributed.world_size() if ranks is None else ranks
    bounds = [len(trajectories) * index // count for index in range(count + 1)]
    parts = []
    for low, high in itertools.pairwise(bounds):
        kept = [t for t in trajectories[low:high] if trainer.keeps(t)]
        parts.append(shard_by_tokens(kept, rank, ranks))
    own = [trajectory for part in parts for trajectory in part]
    if own:
        trainer.annotate(own)
    for trajectory in own:
        if trajectory.padding:
            length = len(trajectory.completion_ids)
            trajectory.annotations["mask"] = np.zeros(length, dtype=bool)
    return parts


def microbatches(
    trajectories: Sequence[Trajectory],
    train,
    device: torch.device,
    gather: Gather = distributed.gather,
) -> Iterator[tuple[MicroBatch, float, bool]]:
    """The micro-batches of an update. A collective.

    Args:
        trajectories: this rank's, annotated; at least one.
        train: the config's section.
        device: where the micro-batches go.
        gather: see above.

    Yields:
        (micro-batch, what its loss is divided by, whether it is the last).
    """
    groups = make_microbatches([t.length for t in trajectories], train.tokens_per_microbatch)
    total, filled, rounds = normalize(trajectories, train.normalizer, groups, gather)
    batch = None
    for index in range(rounds):
        if index < len(groups):
            batch = pack(trajectories, groups[index], device)
        else:
            # Ranks must run the same number of backward passes.
            assert batch is not None
            batch = empty_like(batch)
        denominator = total
        if train.normalizer == "microbatch_token_mean":
            denominator = max(float(batch.mask.sum()), 1.0) * filled
        yield batch, denominator, index == rounds - 1


def normalize(
    trajectories: Sequence[Trajectory],
    normalizer: str,
    groups: Sequence[Sequence[int]],
    gather: Gather = distributed.gather,
) -> tuple[float, int, int]:
    """What the loss of an update is divided by, per `train.normalizer`. A collective.

    A sequence's length is its number of unmasked tokens. A sequence or a micro-batch without any
    does not count. For `sequence_mean` it writes the annotation `weights` [T].

    Args:
        trajectories: this rank's, with masks.
        normalizer: a value of `train.normalizer`.
        groups: the trajectories of each of this rank's micro-batches, by index.
        gather: see above.

    Returns:
        (the divisor, the micro-batches with an unmasked token of all ranks, the most micro-batches
        of a rank). The first two are at least 1.
    """
    lengths = [int(t.annotations["mask"].sum()) for t in trajectories]
    if normalizer == "sequence_mean":
        for trajectory, length in zip(trajectories, lengths):
            weights = np.full(len(trajectory.completion_ids), 1 / max(length, 1), np.float32)
            trajectory.annotations["weights"] = weights
    filled = sum(any(lengths[index] for index in group) for group in groups)
    full = sum(length > 0 for length in lengths)
    own = (len(groups), filled, sum(lengths), full, max(lengths))
    groups_by_rank, filled_by_rank, tokens, sequences, longest = zip(*gather(own))
    if normalizer == "sequence_mean":
        total = sum(sequences)
    elif normalizer == "max_length":
        total = sum(sequences) * max(longest)
    else:
        total = sum(tokens)
    return float(max(total, 1)), max(sum(filled_by_rank), 1), max(groups_by_rank)
