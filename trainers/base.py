"""What a method is: a small class that says which sequences to draw and how to weight their
tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Callable, Sequence

import torch
from omegaconf import DictConfig

from rollouts.data.examples import Prompt, PromptSampler
from rollouts.trajectory import Trajectory, sample_seed
from trainers.core import distributed
from trainers.core.evaluation import describe
from trainers.losses import Loss
from trainers.modes.rollout import make_requests, make_sampling


@dataclass
class Parts:
    """What the loop hands a method. `prompts`, `verifier`, `rollout` and `teacher` are None where
    unused."""

    config: DictConfig
    device: torch.device
    tokenizer: object
    stop_ids: tuple[int, ...]
    vocab: int  # ids at and past it are padding of the heads
    prompts: list[Prompt]
    sampler: PromptSampler
    verifier: Callable[[str, str], float] | None = None
    rollout: object | None = None
    teacher: object | None = None
    teacher_stop: int | None = None
    score_policy: Callable[[Sequence[Trajectory]], None] | None = None  # writes `student_logprobs`


class Trainer:
    """Base of every method. The loop calls `draw`, `keeps`, `annotate`, and runs `loss` on what
    they made.

    `samples` says that sequences come from the rollout engine rather than from data; `distills`
    that there is a teacher; `verifies` that it learns from the verifier, so that every prompt needs
    an answer; `adds_tokens` that a model without the tokens of the streaming protocol is given
    them, as the method teaches their use; `learns` names the fields of an `Example` that are
    supervised targets, which every row must then have. A subclass overrides `annotate` and `loss`,
    and `draw` where sequences come from elsewhere or are to be judged by group."""

    samples = True
    distills = False
    verifies = False
    adds_tokens = False
    learns: tuple[str, ...] = ()

    def __init__(self, parts: Parts):
        self.parts, self.config = parts, parts.config

    @classmethod
    def check(cls, config: DictConfig) -> None:
        """Refuse a config that is impossible for this method, with a `ConfigError` that names the
        key."""

    def draw(self, step: int) -> list[Trajectory]:
        """The trajectories of step 0, 1, …, the same list on every rank: sampled by this rank for
        its share of prompts, scored by the verifier where there are answers, then exchanged. Those
        of a prompt are adjacent."""
        rollout = self.config.rollout
        prompts = [self.parts.prompts[i] for i in self.parts.sampler.indices(step)]
        samples = rollout.samples_per_prompt
        requests = []
        for prompt, occurrence in distributed.share(
            list(zip(prompts, occurrences([p.index for p in prompts])))
        ):
            # A prompt that comes twice in a step goes on counting: its second samples have noise of
            # their own.
            seed = partial(self.seed, step, occurrence * samples)
            requests += make_requests([prompt], samples, seed)
        sampling = make_sampling(
            self.config,
            self.parts.tokenizer,
            self.parts.stop_ids,
            top_p=rollout.top_p,
            max_new_tokens=max_new_tokens(rollout, step),
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            vocab=self.parts.vocab,
        )
        drawn = self.parts.rollout.generate(requests, sampling)
        by_index = {p.index: p for p in prompts}
        for trajectory in drawn:
            describe(
                trajectory,
                by_index[trajectory.prompt_index],
                self.parts.tokenizer,
                self.parts.verifier,
            )
        return [t for part in distributed.gather(drawn) for t in part]

    def seed(self, step: int, first: int, index: int, sample: int) -> int:
        """The seed of sample `first + sample` of prompt `index`."""
        return sample_seed(self.config.seed, step, index, first + sample)

    def keeps(self, trajectory: Trajectory) -> bool:
        """Whether the update learns from it. Every rank asks for every trajectory and must get the
        same answer."""
        return True

    def metrics(self, drawn: Sequence[Trajectory]) -> dict[str, float]:
        """The method's own numbers on a step's trajectories."""
        return {}

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        """Write the annotations [T] that `loss` reads on this rank's share of those kept; `mask`
        always."""
        for trajectory in trajectories:
            trajectory.annotations["mask"] = trajectory.sampled_mask

    def loss(self) -> Loss:
        """The primitives that this method uses."""
        raise TypeError(f"{type(self).__name__} does not define loss()")


def occurrences(items: Sequence[int]) -> list[int]:
    """How often each item has come before, as [0, 0, 1] for [7, 5, 7]."""
    seen: Counter[int] = Counter()
    before = []
    for item in items:
        before.append(seen[item])
        seen[item] += 1
    return before


def max_new_tokens(rollout: DictConfig, step: int) -> int:
    """The limit of step 0, 1, …: `rollout.max_new_tokens`, or what its schedule says from the
    latest entry on."""
    reached = [limit for start, limit in rollout.max_new_tokens_schedule if start <= step + 1]
    return reached[-1] if reached else rollout.max_new_tokens
