"""Distillation from a cache: the files that the writer writes, read and trained on."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rollouts.trajectory import Trajectory
from trainers.conformance.report import SINGLE, Case, agree, vanish
from trainers.conformance.subjects import Setup, log_probs
from trainers.conformance.supervised import Read
from trainers.conformance.world import VOCAB, TinyPolicy
from trainers.core.cache_writer import CacheWriter, facts_of, fill
from trainers.core.teacher_cache import rows_of
from trainers.offline_distillation import OfflineDistillation

COMPONENT = "trainer=offline_distillation"


@functools.cache
def written(top_k: int, equal: bool) -> tempfile.TemporaryDirectory:
    """A cache of three prompts in shards of two; it goes with the process.

    Args:
        equal: the teacher has the student's weights.
    """
    teacher = TinyPolicy(1) if equal else None
    run = Setup(("recipe=opd",), prompts=3, teacher=teacher).run
    read = OfflineDistillation(run).read
    drawn = [read(prompt) for prompt in run.prompts]
    rows = rows_of((t.prompt_index, t.prompt_ids, t.completion_ids) for t in drawn)
    folder = tempfile.TemporaryDirectory(prefix="onstream_conform_")
    writer = CacheWriter(Path(folder.name), facts_of(run, rows, top_k, 2), rows)
    fill(writer, run, lambda: run.teacher, lambda members: drawn[members])
    return folder


class Offline(Read):
    """A trainer that reads a cache of so many tokens."""

    def __init__(self, top_k: int, equal: bool = False):
        folder = written(top_k, equal).name
        super().__init__(("recipe=distill", f"teacher.cache={folder}"), component=COMPONENT)


def tail_kl(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """sum over S of p log(p / q), and the same of all that is left, [T]; of log-probs [T, V].

    Args:
        ids: S, [T, K].
    """
    inside = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, ids, True)
    terms = (teacher.exp() * (teacher - student)).masked_fill(~inside, 0).sum(1)
    if bool(inside.all()):
        return terms
    p, q = (logs.exp().masked_fill(inside, 0).sum(1) for logs in (teacher, student))
    return terms + p * (p / q).log()


def stated(top_k: int) -> None:
    """The divergence of each token and the gradient; with all tokens they are KL(p || q)'s."""
    setup, drawn = Offline(top_k).drawn()
    divergences = []
    for trajectory in drawn:
        student, teacher = (log_probs(p, trajectory) for p in (setup.policy, setup.teacher))
        ids = teacher.topk(top_k, 1).indices
        if not top_k:
            ids = torch.tensor(trajectory.completion_ids)[:, None]
        divergence = tail_kl(student, teacher.detach(), ids)
        # The teacher ends on another token, whose log-prob says nothing of the student's.
        divergences.append(divergence if top_k else divergence[:-1])
    update = setup.update(drawn)
    agree(update.gradient, setup.policy.gradient_of(torch.cat(divergences).mean()), SINGLE)
    for expected, (_, output) in zip(divergences, by_row(drawn, update.outputs)):
        ours = torch.from_numpy(output["divergence"]).double()[: len(expected)]
        agree(ours, expected.detach(), SINGLE, "divergence")


def by_row(drawn: list[Trajectory], outputs: list) -> list:
    """The outputs in the order of the trajectories."""
    order = [trajectory.prompt_index for trajectory in drawn]
    return sorted(outputs, key=lambda output: order.index(output[0].prompt_index))


def equal_teacher(top_k: int) -> None:
    """A teacher with the student's weights has nothing to say."""
    setup, drawn = Offline(top_k).drawn()
    scale = float(setup.update(drawn).gradient.norm())
    setup, drawn = Offline(top_k, equal=True).drawn()
    vanish(setup.update(drawn).gradient, scale)


def cases() -> Iterator[Case]:
    """Of `trainer=offline_distillation`, by the top-k of the cache."""
    yield from Offline(2).cases("top_k=2")
    for top_k in range(VOCAB + 1):
        checks = {"stated objective": stated, "zero at equality": equal_teacher}
        for name, check in checks.items():
            setting = f"top_k={top_k}" + (" of 4: forward KL" if top_k == VOCAB else "")
            yield Case(COMPONENT, name, setting, functools.partial(check, top_k))
