"""A trainer on the tiny policy, and what an update of it does to the weights.

Everything that computes is the code that trains: the trainer's `draw`, `keeps`, `annotate` and
`loss`, the teacher's scoring, the dealing to ranks, the packing, the divisor, the loss and the
kernels. Only the model, the sampler and the process group are replaced.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.components import TRAINERS
from recipes.compose import compose
from rollouts.data.examples import Example, Prompt, PromptSampler
from rollouts.layout import Layout
from rollouts.trajectory import Trajectory
from trainers.conformance.stand_ins import CPU, ExactAnnotations, Planned, TinyTeacher, Words
from trainers.conformance.world import (
    PROMPTS,
    RIGHT,
    STOP,
    TEACHER_STOP,
    TEXTS,
    Completion,
    Exact,
    TinyPolicy,
    tree,
)
from trainers.core.batching import make_microbatches, pack, unpack
from trainers.core.scoring import score_tokens
from trainers.core.updates import microbatches, normalize, shards
from trainers.modes import reading_mode
from trainers.run import Run

Edit = Callable[[Trajectory], None]


@dataclass(frozen=True)
class Update:
    """What one update does.

    Attributes:
        gradient: of all weights, flat, summed over micro-batches and ranks.
        tokens: the unmasked ones.
        outputs: of each trajectory, the per-token arrays that the loss returned.
    """

    gradient: Tensor
    tokens: int
    outputs: list[tuple[Trajectory, dict[str, np.ndarray]]]


@functools.cache
def composed(overrides: tuple[str, ...]):
    """The config of these overrides; composing takes a tenth of a second."""
    return compose(overrides)


class Setup:
    """A trainer with all that it needs.

    Args:
        overrides: of the config; they name the component.
        samples: completions of a prompt.
        prompts: those of a step, or how many of `PROMPTS`.
        texts: of the tokens.
        limit: the most tokens of a completion.
        teacher: its policy; None: one with other weights than the student's.
        sampler: the policy that samples; None: the student.
        shift: of the teacher.
    """

    def __init__(
        self,
        overrides: Sequence[str],
        samples: int = 1,
        prompts: int | Sequence[Prompt] = 1,
        texts: Sequence[str] = TEXTS,
        limit: int = 3,
        teacher: TinyPolicy | None = None,
        sampler: TinyPolicy | None = None,
        shift: int = 0,
    ):
        config = composed(tuple(overrides))
        if isinstance(prompts, int):
            prompts = [plain_prompt(index) for index in range(prompts)]
        rollout = replace(config.rollout, samples_per_prompt=samples, max_new_tokens=limit)
        train = replace(config.train, prompts_per_step=len(prompts))
        self.config = config = replace(config, rollout=rollout, train=train)
        self.limit, self.samples = limit, samples
        self.policy, self.reference = (TinyPolicy(seed, len(texts)) for seed in (1, 3))
        self.teacher = teacher or TinyPolicy(2, len(texts), width=5, float32_states=True)
        self.engine = Planned(sampler or self.policy)
        method = TRAINERS.resolve(config.trainer)
        method.check(config)
        self.run = Run(
            config=config,
            mode=reading_mode(config),
            method=method,
            tokenizer=Words(texts),
            stop_ids=(STOP,),
            teacher_stop=TEACHER_STOP,
            vocab=len(texts),
            prompts=prompts,
            sampler=PromptSampler(len(prompts), len(prompts), 0),
            verifier=verify,
            rollout=self.engine,
            score_policy=self.score_policy,
        )
        if method.distills:
            self.run.teacher = TinyTeacher(self.run, self.teacher, shift)
        method.prepare(self.run)
        self.trainer = method(self.run)
        self.loss = self.trainer.loss()

    def exact(self) -> Exact:
        """Student and teacher as tables, at the temperature of the run."""
        temperature = self.config.rollout.temperature
        return Exact.of(self.policy, self.teacher, self.limit, temperature=temperature)

    def draw(self, *plan: Sequence[Completion]) -> list[Trajectory]:
        """The trainer's trajectories where the prompts have these completions."""
        self.engine.plan = dict(enumerate(plan))
        drawn = self.trainer.draw(0)
        for trajectory in drawn:
            # Those that are read from data have annotations of training's precision.
            trajectory.annotations = ExactAnnotations(trajectory.annotations)
        return drawn

    def score_policy(
        self, trajectories: Sequence[Trajectory], name: str = "student_logprobs", adapters=True
    ) -> None:
        """As `Loop.score_policy`; without adapters the weights are the reference's."""
        batch = pack(trajectories, range(len(trajectories)), CPU)
        score = functools.partial(score_tokens, temperature=self.config.rollout.temperature)
        scored = (self.policy if adapters else self.reference)(
            batch,
            lambda head, hidden, batch: (
                score(head, hidden, targets=batch.targets, vocab=self.run.vocab).logprobs
            ),
        )
        for trajectory, values in zip(trajectories, unpack(batch, trajectories, scored)):
            trajectory.annotations[name] = values

    def update(
        self,
        trajectories: Sequence[Trajectory],
        ranks: int = 1,
        budget: int = 4096,
        edit: Edit | None = None,
        **train: Any,
    ) -> Update:
        """One update on copies of the trajectories.

        Args:
            ranks: how many of them the work is dealt to, one after the other.
            budget: `train.tokens_per_microbatch`.
            edit: changes each trajectory after it was annotated.
            train: other keys of the section.
        """
        section = replace(self.config.train, tokens_per_microbatch=budget, **train)
        by_rank = []
        for rank in range(ranks):
            # What is annotated is a copy.
            drawn = copy.deepcopy(list(trajectories))
            by_rank.append(shards(self.trainer, drawn, 1, rank, ranks)[0])
        for trajectory in itertools.chain(*by_rank):
            if edit is not None:
                edit(trajectory)
        if not by_rank[0]:
            return Update(torch.zeros_like(self.policy.gradient()), 0, [])
        return self._summed(by_rank, section)

    def _summed(self, by_rank: list[list[Trajectory]], section) -> Update:
        counts: list = []
        for own in by_rank:
            groups = make_microbatches([t.length for t in own], section.tokens_per_microbatch)
            # Each rank's own numbers; below, every rank is given those of all.
            normalize(
                own, section.normalizer, groups, lambda count: counts.append(count) or [count]
            )
        self.policy.zero_grad()
        outputs = []
        for own in by_rank:
            for batch, denominator, _ in microbatches(own, section, CPU, lambda _: counts):
                loss = functools.partial(self.loss, denominator=denominator)
                output = self.policy(batch, loss)
                output.pop("loss").backward()
                outputs += _per_trajectory(batch, own, output)
        tokens = sum(int(t.annotations["mask"].sum()) for own in by_rank for t in own)
        return Update(self.policy.gradient(), tokens, outputs)

    def expected(self, edit: Edit | None = None, sampler: TinyPolicy | None = None) -> Tensor:
        """The mean over all completions, or all groups of `samples`, of N times the gradient.

        Args:
            edit: as in `update`.
            sampler: the policy whose probabilities weigh them; None: the student.
        """
        nodes, temperature = tree(self.limit), self.config.rollout.temperature
        with torch.no_grad():
            table = nodes.log_probs(sampler or self.policy, PROMPTS[0], temperature)
        total = torch.zeros_like(self.policy.gradient())
        for group in itertools.product(nodes.completions, repeat=self.samples):
            probability = sum(nodes.log_prob(table, one) for one in group).exp()
            update = self.update(self.draw(group), edit=edit)
            total += probability * update.tokens * update.gradient
        return total


def log_probs(policy: TinyPolicy, trajectory: Trajectory) -> Tensor:
    """Log-probs [T, V] at the completion's tokens of one sequence by itself, differentiable."""
    layout = trajectory.layout or Layout(trajectory.length)
    positions, mask = (torch.from_numpy(part) for part in (layout.positions(), layout.mask()))
    states = policy.states(torch.tensor(trajectory.token_ids), positions, mask)
    logits = (states @ policy.head.weight.T + policy.head.bias)[:, : policy.vocab]
    return logits.log_softmax(-1)[len(trajectory.prompt_ids) - 1 : -1]


def sampled_log_probs(policy: TinyPolicy, trajectory: Trajectory) -> Tensor:
    """Those of its own tokens, [T]."""
    ids = torch.tensor(trajectory.completion_ids)[:, None]
    return log_probs(policy, trajectory).gather(-1, ids)[:, 0]


def _per_trajectory(batch, trajectories, output) -> list[tuple[Trajectory, dict[str, np.ndarray]]]:
    """Each member of a micro-batch with its part of the loss's per-token output."""
    parts = {
        name: unpack(batch, trajectories, values)
        for name, values in output.items()
        if values is not None and batch.members
    }
    return [
        (trajectories[member], {name: arrays[place] for name, arrays in parts.items()})
        for place, member in enumerate(batch.members)
    ]


def plain_prompt(index: int) -> Prompt:
    ids = PROMPTS[index % len(PROMPTS)]
    example = Example(index, [], answer="7", solution=TEXTS[RIGHT] + TEXTS[2])
    return Prompt(index, ids, Words().decode(ids), example)


def verify(completion: str, answer: str) -> float:
    """A verifier: the completion has the right box."""
    return float(f"\\boxed{{{answer}}}" in completion)
