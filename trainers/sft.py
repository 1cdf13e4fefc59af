"""Supervised fine-tuning: cross-entropy on the data's own solutions.

The sequences are read, not sampled. The prompt is from the data; the completion is the example's
`solution` and the end token. It is the cold start of other methods, and it trains the embedded tiny
models. Examples are not packed to a fixed length, because the loop packs by token budget anyway.
There is no schedule but the loop's.

    torchrun --nproc_per_node=N train.py recipe=sft data.path=FILE
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rollouts.data.examples import Prompt
from rollouts.trajectory import Trajectory
from trainers.base import Trainer
from trainers.losses import Loss
from trainers.run import Run


class CrossEntropyTrainer(Trainer):
    """Base of methods that take cross-entropy on each token of their trajectories."""

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        super().annotate(trajectories)
        for trajectory in trajectories:
            ones = np.ones(len(trajectory.completion_ids), dtype=np.float32)
            trajectory.annotations["ce_weights"] = ones

    def loss(self) -> Loss:
        return Loss(cross_entropy=True, vocab=self.run.vocab)


class SolutionReader(Trainer):
    """Base of methods that read the data's own solutions."""

    samples = False
    layouts = (None,)
    learns = ("solution",)

    @classmethod
    def target_length(cls, prompt: Prompt, run: Run) -> int:
        return len(target_ids(prompt, run.tokenizer))

    def draw(self, step: int) -> list[Trajectory]:
        indices = self.run.sampler.indices(step)
        return [self.read(self.run.prompts[index]) for index in indices]

    def read(self, prompt: Prompt) -> Trajectory:
        """The prompt with its target as the completion."""
        return Trajectory(
            prompt_index=prompt.index,
            sample_index=0,
            prompt_ids=list(prompt.token_ids),
            completion_ids=target_ids(prompt, self.run.tokenizer),
            finish_reason="stop",
            prompt=prompt.text,
            completion=prompt.example.solution,
            answer=prompt.example.answer,
        )


class SupervisedFineTuning(SolutionReader, CrossEntropyTrainer):
    """Cross-entropy on the solutions, averaged over all completion tokens of the step."""


def target_ids(prompt: Prompt, tokenizer) -> list[int]:
    """The ids of the solution and the end token."""
    ids = tokenizer(prompt.example.solution, add_special_tokens=False).input_ids
    return [*ids, tokenizer.eos_token_id]
