"""On-policy SFT (arXiv 2602.13407): supervised fine-tuning on the model's own short correct
answers.

Each step samples n completions per prompt, keeps those that are correct and ended by themselves
within L = `rollout.max_new_tokens`, and takes cross-entropy on them. That is the policy gradient of
a reward of 1 for a kept sample and 0 for any other: no old log-probs, reference model, advantage or
value function, because a verifier cannot be hacked (so no KL) and one reward needs no group
statistics. L is the only length control; `max_length` is the paper's normaliser, `token_mean` the
released code's.

Differs from the released code: a sample cut at L is out even where its answer is already there;
prompts are never trimmed to fit the number of ranks; a batch with nothing to keep is skipped, with
a count (`train/skipped`).

    torchrun --nproc_per_node=N train.py recipe=onpolicy_sft [rollout.max_new_tokens=60]

`rollout.fixed_steps=K` is the paper's off-policy control: the samples of the first K steps are
drawn once, from the starting model, filtered in the same way, and trained on over and over."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from recipes.errors import ConfigError
from rollouts.trajectory import Trajectory
from trainers.sft import CrossEntropyTrainer


class OnPolicySFT(CrossEntropyTrainer):
    """Cross-entropy on what is kept; `train.normalizer` says over what it is averaged."""

    verifies = True

    def __init__(self, run):
        super().__init__(run)
        # Before the first weight sync, also after a resume, the rollout engine holds the weights of
        # model.path.
        self.fixed = [self._judged(step) for step in range(self.config.rollout.fixed_steps or 0)]

    @classmethod
    def check(cls, config) -> None:
        rollout = config.rollout
        for key, value, own in (
            ("temperature", rollout.temperature, 1),
            ("top_p", rollout.top_p, 1),
            ("top_k", rollout.top_k, -1),
        ):
            if value != own and not config.allow_biased_sampling:
                raise ConfigError(
                    f"rollout.{key}={value}: recipe={config.recipe} needs samples of the policy itself, "
                    f"{key} {own}; allow_biased_sampling=true takes others"
                )

    def draw(self, step: int) -> list[Trajectory]:
        return self.fixed[step % len(self.fixed)] if self.fixed else self._judged(step)

    def _judged(self, step: int) -> list[Trajectory]:
        drawn = super().draw(step)
        for trajectory in drawn:
            trajectory.reward = float(trajectory.score > 0 and trajectory.finish_reason == "stop")
        return drawn

    def keeps(self, trajectory: Trajectory) -> bool:
        return trajectory.reward > 0

    def metrics(self, drawn: Sequence[Trajectory]) -> dict[str, float]:
        kept = np.array([t.reward for t in drawn]).reshape(
            -1, self.config.rollout.samples_per_prompt
        )
        return {
            "rollout/kept_frac": float(kept.mean()),
            "rollout/prompts_with_none": int((kept.sum(1) == 0).sum()),
        }
