"""Supervised fine-tuning: cross-entropy on the data's own solutions.

The sequences are read, not sampled: prompt from the data, completion = the example's `solution` and
the end token. It is the cold start of other methods and makes the embedded tiny models; it has no
packing across examples of a fixed length and no schedule but the loop's, because the loop packs by
token budget anyway.

    torchrun --nproc_per_node=N train.py recipe=sft data.path=FILE
"""

from __future__ import annotations

from typing import Sequence

import numpy as np

from rollouts.data.examples import Prompt
from rollouts.trajectory import Trajectory
from trainers.base import Trainer
from trainers.losses import Loss


class CrossEntropyTrainer(Trainer):
    """Base of methods that take cross-entropy on each token of their trajectories."""

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        super().annotate(trajectories)
        for trajectory in trajectories:
            trajectory.annotations["ce_weights"] = np.ones(
                len(trajectory.completion_ids), dtype=np.float32
            )

    def loss(self) -> Loss:
        return Loss(cross_entropy=True, vocab=self.run.vocab)


class SupervisedFineTuning(CrossEntropyTrainer):
    """Token mean over all completion tokens of the step."""

    samples = False
    learns = ("solution",)

    def draw(self, step: int) -> list[Trajectory]:
        return [self.read(self.run.prompts[index]) for index in self.run.sampler.indices(step)]

    def read(self, prompt: Prompt) -> Trajectory:
        """The prompt with its target."""
        tokenizer, solution = self.run.tokenizer, prompt.example.solution
        ids = tokenizer(solution, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        return Trajectory(
            prompt.index,
            0,
            list(prompt.token_ids),
            ids,
            "stop",
            prompt=prompt.text,
            completion=solution,
            answer=prompt.example.answer,
        )
