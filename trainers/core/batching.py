"""Packed micro-batches of trajectories: a budget in tokens, no padding to the longest row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from recipes.errors import AnnotationError
from rollouts.layout import Layout
from rollouts.trajectory import Annotations, Trajectory


@dataclass
class MicroBatch:
    """Sequences laid end to end: L tokens in all, T of them completion tokens, to be predicted.

    Attributes:
        input_ids: [1, L] int64, what the model reads.
        position_ids: [1, L] int64.
        rows: [T] int64, the places of the hidden states that predict `targets`. A token's is that
            of the token before it.
        targets: [T] int64.
        bounds: where sequences begin, and L at the end.
        annotations: [T] or [T, …] by name, in the order of `targets`.
        members: indices of the trajectories that the micro-batch holds, in order.
        layouts: one per sequence; None if all are plain causal ones.
        frames: [F, D] of each sequence that has any, in order; None if none has.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    bounds: list[int]
    annotations: dict[str, torch.Tensor] = field(default_factory=dict)
    members: list[int] = field(default_factory=list)
    layouts: list[Layout] | None = None
    frames: list[np.ndarray] | None = None

    @property
    def mask(self) -> torch.Tensor:
        """[T] bool: the tokens that count in the loss."""
        return self.annotations["mask"]


def assign(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal sequences out, longest first, to the rank with the fewest tokens.

    Args:
        lengths: of the sequences, in tokens.
        ranks: how many there are.

    Returns:
        for each rank, the indices of its sequences, ascending.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for index in _longest_first(lengths):
        emptiest = min(range(ranks), key=lambda r: (totals[r], r))
        shares[emptiest].append(index)
        totals[emptiest] += lengths[index]
    return [sorted(share) for share in shares]


def shard_by_tokens(trajectories: Sequence[Trajectory], rank: int, ranks: int) -> list[Trajectory]:
    """A rank's part of an update's trajectories, dealt by `assign`.

    A rank that is left without one gets a copy of the shortest, marked as padding. It must run the
    same collectives as the others. Nothing is ever dropped to make the numbers even.
    """
    lengths = [trajectory.length for trajectory in trajectories]
    shard = [trajectories[index] for index in assign(lengths, ranks)[rank]]
    if shard or not trajectories:
        return shard
    # The original gets its annotations on another rank.
    shortest = min(trajectories, key=lambda trajectory: trajectory.length)
    annotations = Annotations(shortest.annotations)
    return [replace(shortest, annotations=annotations, padding=True)]


def make_microbatches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group sequences into micro-batches of at most `budget` tokens, first fit, longest first.

    A sequence longer than the budget is a micro-batch of its own.

    Args:
        lengths: of the sequences, in tokens.
        budget: `train.tokens_per_microbatch`.

    Returns:
        for each micro-batch, the indices of its sequences.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in _longest_first(lengths):
        length = lengths[index]
        group = next((g for g, left in enumerate(room) if left >= length), None)
        if group is None:
            group = len(groups)
            groups.append([])
            room.append(max(budget, length))
        groups[group].append(index)
        room[group] -= length
    return groups


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def pack(
    trajectories: Sequence[Trajectory], members: Sequence[int], device: torch.device
) -> MicroBatch:
    """Lay the trajectories at `members` end to end. All must carry the same annotations.

    Raises:
        AnnotationError: one does not have an entry per completion token.
    """
    ids, positions, rows, targets = [], [], [], []
    start, bounds = 0, [0]
    packed = [trajectories[member] for member in members]
    for trajectory in packed:
        first, end = start + len(trajectory.prompt_ids), start + trajectory.length
        ids += trajectory.token_ids
        positions += _positions(trajectory)
        # A token is predicted by the hidden state before it.
        rows += range(first - 1, end - 1)
        targets += _targets(trajectory)
        bounds.append(end)
        start = end
    return MicroBatch(
        input_ids=torch.tensor([ids], dtype=torch.long, device=device),
        position_ids=torch.tensor([positions], dtype=torch.long, device=device),
        rows=torch.tensor(rows, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
        bounds=bounds,
        annotations=_annotations(packed, device),
        members=list(members),
        layouts=_layouts(packed),
        frames=[t.frames for t in packed if t.frames is not None] or None,
    )


def _positions(trajectory: Trajectory) -> Sequence[int]:
    if trajectory.layout is None:
        return range(trajectory.length)
    return trajectory.layout.positions().tolist()


def _targets(trajectory: Trajectory) -> list[int]:
    """The ids that the policy scores: the sampled ones, but for a relabelled stop."""
    relabelled = trajectory.annotations.get("targets")
    return trajectory.completion_ids if relabelled is None else relabelled.tolist()


def _layouts(trajectories: Sequence[Trajectory]) -> list[Layout] | None:
    if all(trajectory.layout is None for trajectory in trajectories):
        return None
    return [trajectory.layout or Layout(trajectory.length) for trajectory in trajectories]


def _annotations(
    trajectories: Sequence[Trajectory], device: torch.device
) -> dict[str, torch.Tensor]:
    annotations = {}
    for name in trajectories[0].annotations if trajectories else ():
        for trajectory in trajectories:
            entries, tokens = len(trajectory.annotations[name]), len(trajectory.completion_ids)
            if entries != tokens:
                raise AnnotationError(
                    f"prompt {trajectory.prompt_index}: annotation '{name}' has {entries} entries "
                    f"for {tokens} completion tokens"
                )
        values = np.concatenate([trajectory.annotations[name] for trajectory in trajectories])
        annotations[name] = torch.from_numpy(values).to(device)
    return annotations


def empty_like(batch: MicroBatch) -> MicroBatch:
    """A micro-batch that runs the model but counts for nothing.

    It is for a rank that has fewer micro-batches than the others.
    """
    annotations = {name: torch.zeros_like(value) for name, value in batch.annotations.items()}
    return replace(batch, annotations=annotations, members=[])


def unpack(
    batch: MicroBatch, trajectories: Sequence[Trajectory], values: torch.Tensor
) -> list[np.ndarray]:
    """Cut per-token values into one array per trajectory.

    Args:
        batch: the micro-batch, packed of `trajectories`.
        trajectories: those that `batch.members` are indices of.
        values: [T, …] of the micro-batch's tokens.

    Returns:
        [T_i, …] for each member, in the order of `members`.
    """
    if not batch.members:
        return []
    lengths = [len(trajectories[member].completion_ids) for member in batch.members]
    return np.split(values.detach().cpu().numpy(), np.cumsum(lengths)[:-1])
