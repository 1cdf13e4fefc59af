"""On-policy SFT (arXiv 2602.13407): fine-tuning on the model's own short correct answers.

Each step samples n completions per prompt and takes cross-entropy on those that it keeps. It keeps
a sample that is correct and ended by itself within L = `rollout.max_new_tokens`. That is the policy
gradient of a reward of 1 for a kept sample and 0 for any other.

There are no old log-probs, reference model, advantage or value function. A verifier cannot be
hacked, so there is no KL. One reward needs no group statistics. L is the only length control.
`train.normalizer=max_length` is the paper's, `token_mean` the released code's.

It differs from the released code in three points:
- A sample cut at L is out even where its answer is already there.
- Prompts are never trimmed to fit the number of ranks.
- A batch with nothing to keep is skipped, with a count (`train/skipped`).

    torchrun --nproc_per_node=N train.py recipe=onpolicy_sft [rollout.max_new_tokens=60]

`rollout.fixed_steps=K` is the paper's off-policy control. The samples of the first K steps are
drawn once, from the starting model, and filtered in the same way. The run trains on them over and
over.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recipes.errors import ConfigError
from rollouts.trajectory import Trajectory
from trainers.sft import CrossEntropyTrainer


class OnPolicySFT(CrossEntropyTrainer):
    """Cross-entropy on the kept samples; `train.normalizer` says over what it is averaged."""

    verifies = True

    def __init__(self, run):
        super().__init__(run)
        # Before the first weight sync, also after a resume, the rollout engine holds the weights of
        # model.path.
        fixed_steps = self.config.rollout.fixed_steps or 0
        self.fixed = [self._rewarded(step) for step in range(fixed_steps)]

    @classmethod
    def check(cls, config) -> None:
        rollout = config.rollout
        for key, value, unbiased in (
            ("temperature", rollout.temperature, 1),
            ("top_p", rollout.top_p, 1),
            ("top_k", rollout.top_k, -1),
        ):
            if value != unbiased and not config.allow_biased_sampling:
                raise ConfigError(
                    f"rollout.{key}={value}: recipe={config.recipe} needs samples of the policy "
                    f"itself, {key} {unbiased}; allow_biased_sampling=true takes others"
                )

    def draw(self, step: int) -> list[Trajectory]:
        if self.fixed:
            return self.fixed[step % len(self.fixed)]
        return self._rewarded(step)

    def _rewarded(self, step: int) -> list[Trajectory]:
        """Samples of the current policy, with `reward` 1 for a sample to keep, else 0."""
        trajectories = super().draw(step)
        for trajectory in trajectories:
            ended = trajectory.finish_reason == "stop"
            reward = self.whole_reward(trajectory, trajectory.score)
            trajectory.reward = float(reward > self.config.keep_above and ended)
        return trajectories

    def keeps(self, trajectory: Trajectory) -> bool:
        return trajectory.reward > 0

    def metrics(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        rewards = np.array([trajectory.reward for trajectory in trajectories])
        # [P, n]: the samples of a prompt are adjacent.
        kept = rewards.reshape(-1, self.config.rollout.samples_per_prompt)
        return {
            "rollout/kept_frac": float(kept.mean()),
            "rollout/prompts_with_none": int((kept.sum(1) == 0).sum()),
        }
