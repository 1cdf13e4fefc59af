"""Turns trajectories into packed micro-batches: no padding to the longest row, a budget in
tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Sequence

import numpy as np
import torch

from rollouts.layout import Layout
from rollouts.trajectory import Annotations, Trajectory


@dataclass
class MicroBatch:
    """Sequences laid end to end. L tokens in all, T of them completion tokens, to be predicted.

    The model sees `input_ids` and `position_ids` [1, L]; `rows` [T] are the hidden states that
    predict `targets` [T], i.e. those of the token before. `bounds` are where sequences begin, and
    L. Annotations are [T] or [T, …], in the same order. `layouts`, one per sequence, is None where
    all are plain causal ones."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    bounds: list[int]
    annotations: dict[str, torch.Tensor] = field(default_factory=dict)
    # indices of the trajectories it holds, in order
    members: list[int] = field(default_factory=list)
    layouts: list[Layout] | None = None
    frames: list[np.ndarray] | None = None  # of the sequences that have any, in order

    @property
    def mask(self) -> torch.Tensor:
        """[T] bool: the tokens that count in the loss."""
        return self.annotations["mask"]


def assign(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal sequences out so that ranks hold about the same number of tokens: longest first, to the
    emptiest."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for index in order:
        emptiest = min(range(ranks), key=lambda r: (totals[r], r))
        shares[emptiest].append(index)
        totals[emptiest] += lengths[index]
    return [sorted(share) for share in shares]


def shard_by_tokens(trajectories: Sequence[Trajectory], rank: int, ranks: int) -> list[Trajectory]:
    """A rank's part of an update's trajectories, dealt by `assign`.

    A rank that is left without one gets a copy of the shortest, marked as padding: it must run the
    same collectives as the others. Nothing is ever dropped to make the numbers even."""
    mine = [trajectories[i] for i in assign([t.length for t in trajectories], ranks)[rank]]
    if not mine and trajectories:
        shortest = min(trajectories, key=lambda t: t.length)
        mine = [replace(shortest, annotations=Annotations(shortest.annotations), padding=True)]
    return mine


def make_microbatches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group sequences into micro-batches of at most `budget` tokens, first fit, longest first.

    A sequence longer than the budget is a micro-batch of its own.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = next((g for g, left in enumerate(room) if left >= lengths[index]), None)
        if slot is None:
            groups.append([])
            room.append(max(budget, lengths[index]))
            slot = len(groups) - 1
        groups[slot].append(index)
        room[slot] -= lengths[index]
    return groups


def pack(
    trajectories: Sequence[Trajectory], members: Sequence[int], device: torch.device
) -> MicroBatch:
    """Lay the trajectories at `members` end to end. All must carry the same annotations."""
    ids, positions, rows, targets = [], [], [], []
    start, bounds = 0, [0]
    for member in members:
        trajectory = trajectories[member]
        prompt, completion = len(trajectory.prompt_ids), len(trajectory.completion_ids)
        ids += trajectory.token_ids
        positions += (
            range(prompt + completion)
            if trajectory.layout is None
            else trajectory.layout.positions().tolist()
        )
        rows += range(start + prompt - 1, start + prompt + completion - 1)
        relabelled = trajectory.annotations.get("targets")
        targets += trajectory.completion_ids if relabelled is None else relabelled.tolist()
        start += prompt + completion
        bounds.append(start)
    layouts = None
    if any(trajectories[m].layout is not None for m in members):
        layouts = [trajectories[m].layout or Layout(trajectories[m].length) for m in members]
    names = trajectories[members[0]].annotations if members else ()
    annotations = {
        name: torch.from_numpy(
            np.concatenate([trajectories[m].annotations[name] for m in members])
        ).to(device)
        for name in names
    }

    frames = [trajectories[m].frames for m in members if trajectories[m].frames is not None] or None

    def long(values):
        return torch.tensor(values, dtype=torch.long, device=device)

    return MicroBatch(
        long(ids)[None],
        long(positions)[None],
        long(rows),
        long(targets),
        bounds,
        annotations,
        list(members),
        layouts,
        frames,
    )


def empty_like(batch: MicroBatch) -> MicroBatch:
    """A micro-batch that runs the model but counts for nothing: for a rank that has fewer than the
    others."""
    annotations = {name: torch.zeros_like(value) for name, value in batch.annotations.items()}
    return MicroBatch(
        batch.input_ids,
        batch.position_ids,
        batch.rows,
        batch.targets,
        batch.bounds,
        annotations,
        [],
        batch.layouts,
        batch.frames,
    )


def unpack(
    batch: MicroBatch, trajectories: Sequence[Trajectory], values: torch.Tensor
) -> list[np.ndarray]:
    """Cut per-token values [T, …] of a micro-batch into one array per member, in the order of
    `members`."""
    lengths = [len(trajectories[m].completion_ids) for m in batch.members]
    return np.split(values.detach().cpu().numpy(), np.cumsum(lengths)[:-1]) if lengths else []
