"""What a method is: a small class that says which sequences to draw and how to weight their
tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rollouts.trajectory import Trajectory, sample_seed
from trainers.core import distributed
from trainers.modes.plain import make_requests

if TYPE_CHECKING:
    from rollouts.data.examples import Prompt
    from trainers.losses import Loss
    from trainers.run import Run


class Trainer:
    """Base of every method.

    The loop calls `draw`, `keeps` and `annotate`, and runs `loss` on the annotated trajectories. A
    subclass overrides `annotate` and `loss`. It overrides `draw` where sequences come from
    elsewhere, or are scored as groups.

    Attributes:
        samples: sequences come from the rollout engine, not from data.
        distills: there is a teacher.
        aligns: it may have another tokenizer (trainers/spans.py).
        verifies: the method learns from the verifier, so every prompt needs an answer.
        adds_tokens: a model without the streaming tokens is given them, as the method teaches
            their use.
        layouts: values of `streaming.layout` that it can use. A method that samples has no decision
            head, which `scheduled` needs.
        learns: fields of an `Example` that are supervised targets, which every row must have.
        run: the `Run`: config, data, models.
        config: the run's.
    """

    samples = True
    distills = False
    aligns = False
    verifies = False
    adds_tokens = False
    layouts: tuple[str | None, ...] = (None, "grouped", "interleaved", "batch")
    learns: tuple[str, ...] = ()

    def __init__(self, run: Run):
        self.run = run
        self.config = run.config

    @classmethod
    def check(cls, config) -> None:
        """Refuse a config that is impossible for this method.

        Raises:
            ConfigError: one line that names the key.
        """

    @classmethod
    def prepare(cls, run: Run) -> None:
        """Read what the method needs beside the data, when the prompts are known.

        No model is loaded yet.

        Raises:
            OnstreamError: one line that names the key or file.
        """

    @classmethod
    def needs_answers(cls, config) -> bool:
        """Whether the method learns from the verifier under this config."""
        return cls.verifies and getattr(config.reward, "verifier_weight", 1.0) != 0

    @classmethod
    def target_length(cls, prompt: Prompt, run: Run) -> int:
        """The tokens of a supervised target, without an opening; for methods that have `learns`."""
        raise TypeError(f"{cls.__name__} does not define target_length()")

    def draw(self, step: int) -> list[Trajectory]:
        """The trajectories of step 0, 1, …, the same list on every rank.

        Each rank samples for its part of the prompts and scores where there are answers; then the
        ranks exchange them. The trajectories of a prompt are adjacent.
        """
        run, rollout = self.run, self.config.rollout
        # Prepared for every method that samples.
        assert run.sampler is not None and run.rollout is not None
        prompts = [run.prompts[index] for index in run.sampler.indices(step)]
        repeats = occurrences([prompt.index for prompt in prompts])
        requests = []
        for prompt, occurrence in distributed.shard_contiguous(list(zip(prompts, repeats))):
            # A prompt that comes twice in a step goes on counting its samples, so that the second
            # ones have noise of their own.
            first = occurrence * rollout.samples_per_prompt
            seed = partial(self.seed, step, first)
            requests += make_requests([prompt], rollout.samples_per_prompt, seed)
        sampling = run.mode.sampling(
            run.tokenizer,
            run.stop_ids,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_new_tokens=max_new_tokens(rollout, step),
            vocab=run.vocab,
            missing=run.missing,
        )
        trajectories = run.rollout.generate(requests, sampling)
        run.mode.score_all(run, prompts, trajectories)
        if run.functions is not None:
            run.mode.score_functions(run, prompts, trajectories)
        gathered = [t for part in distributed.gather(trajectories) for t in part]
        if run.functions is not None:
            failures = [(t.prompt_index, t.failures) for t in gathered]
            say = run.say if distributed.rank() == 0 else _nothing
            run.functions.account(step + 1, failures, say)
        return gathered

    def whole_reward(self, trajectory: Trajectory, verified: float | None) -> float:
        """The weighted sum of what the verifier is worth and of `reward.functions`.

        Args:
            trajectory: scored.
            verified: the verifier's score, or what the method makes of it.
        """
        rewards = self.config.reward
        others = sum(rewards.functions[n].weight * v for n, v in trajectory.functions.items())
        return rewards.verifier_weight * (verified or 0.0) + others

    def seed(self, step: int, first: int, index: int, sample: int) -> int:
        """The seed of sample `first + sample` of prompt `index`."""
        return sample_seed(self.config.seed, step, index, first + sample)

    def keeps(self, trajectory: Trajectory) -> bool:
        """Whether the update learns from it.

        Every rank asks for every trajectory and must get the same answer.
        """
        return True

    def metrics(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """The method's own numbers on a step's trajectories."""
        return {}

    def token_metrics(
        self, trajectory: Trajectory, output: Mapping[str, np.ndarray]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The method's own means over tokens.

        Args:
            trajectory: annotated.
            output: the loss's per-token arrays [T].

        Returns:
            metric name -> (values [T], which tokens count [T] bool).
        """
        return {}

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        """Write the annotations [T] that `loss` reads; `mask` always.

        Args:
            trajectories: this rank's part of those that are kept.
        """
        for trajectory in trajectories:
            trajectory.annotations["mask"] = trajectory.sampled_mask

    def loss(self) -> Loss:
        """The primitives that this method uses."""
        raise TypeError(f"{type(self).__name__} does not define loss()")

    def after_training(self) -> None:
        """What the method measures when the last step is done. A collective."""


def _nothing(text: str) -> None:
    """Another rank says it."""


def occurrences(items: Sequence[int]) -> list[int]:
    """How often each item has come before, as [0, 0, 1] for [7, 5, 7]."""
    seen: Counter[int] = Counter()
    before = []
    for item in items:
        before.append(seen[item])
        seen[item] += 1
    return before


def max_new_tokens(rollout: Any, step: int) -> int:
    """The limit of step 0, 1, …: `rollout.max_new_tokens`, or the latest entry of its schedule."""
    reached = [limit for start, limit in rollout.max_new_tokens_schedule if start <= step + 1]
    return reached[-1] if reached else rollout.max_new_tokens
