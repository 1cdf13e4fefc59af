"""GRPO (arXiv 2402.03300): policy gradient with advantages relative to the other samples of a
prompt.

The reward of a completion is its accuracy plus gamma times a length reward. Less the mean of its
group, over the group's standard deviation, it is the advantage of all its tokens, in PPO's clipped
objective; a KL to the starting weights is added to the loss. There is no value function and no
filter: groups without a difference have advantage 0 and only their KL counts. The clip has bounds
of its own on either side (arXiv 2503.14476); the ratio to the policy that sampled is computed by
the trainer, before the first of `train.minibatches` updates. With one update per batch it is 1,
nothing clips, and that pass is left out. `grpo.importance_cap` makes up for a rollout engine whose
log-probs differ from the trainer's: each token is weighted by the ratio of the two, cut at the cap.

The length reward is accuracy * (1 - tokens / L), L = `rollout.max_new_tokens`: in [0, 1), and only
for correct answers, so that a short wrong one gains nothing. On-policy SFT's paper, which starts
from "accuracy + gamma * length", was not at hand for its form; this is the one that HRPO uses for
each of its stages (docs/specification.md, 4).

    torchrun --nproc_per_node=N train.py recipe=grpo [grpo.gamma=0.5] [grpo.kl_beta=0]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from recipes.errors import ConfigError
from rewards.length import length_reward
from rollouts.trajectory import Trajectory
from trainers.base import Trainer, max_new_tokens
from trainers.losses import Loss

EPSILON = 1e-6  # added to a group's standard deviation


class GRPO(Trainer):
    """The options are the config's section `grpo`."""

    verifies = True

    def __init__(self, run):
        super().__init__(run)
        self.reference = None
        if self.config.grpo.kl_beta > 0:
            from trainers.core.teacher import Reference

            self.reference = Reference(run)

    @classmethod
    def check(cls, config) -> None:
        if config.rollout.samples_per_prompt < 2:
            raise ConfigError(
                f"rollout.samples_per_prompt={config.rollout.samples_per_prompt}: recipe={config.recipe} "
                "compares samples of one prompt; give 2 or more"
            )

    def draw(self, step: int) -> list[Trajectory]:
        trajectories = super().draw(step)
        limit = max_new_tokens(self.config.rollout, step)
        for trajectory, advantages in zip(trajectories, self.advantages(trajectories, limit)):
            trajectory.annotations["advantages"] = advantages
        return trajectories

    def advantages(self, trajectories: Sequence[Trajectory], limit: int) -> list[np.ndarray]:
        """Each trajectory's advantages [T] float32, from the `reward` that it is given here.

        Args:
            trajectories: of a step; those of a prompt are adjacent.
            limit: that on new tokens.
        """
        for trajectory in trajectories:
            trajectory.reward = length_reward(trajectory, limit, self.config.grpo.gamma)
        by_trajectory = self.in_groups([t.reward for t in trajectories])
        return [
            np.full(len(t.completion_ids), advantage, np.float32)
            for t, advantage in zip(trajectories, by_trajectory)
        ]

    def in_groups(self, rewards: Sequence[float]) -> np.ndarray:
        """The advantage of each trajectory of a step [P * n] over the others of its prompt."""
        groups = np.array(rewards).reshape(-1, self.config.rollout.samples_per_prompt)
        return group_advantages(groups, self.config.grpo.normalize_std).ravel()

    def metrics(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        rewards = np.array([t.reward for t in trajectories])
        groups = rewards.reshape(-1, self.config.rollout.samples_per_prompt)
        return {"reward/equal_groups_frac": float((np.ptp(groups, axis=1) == 0).mean())}

    def token_metrics(
        self, trajectory: Trajectory, output: Mapping[str, np.ndarray]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        mask = trajectory.annotations["mask"]
        names = {"kl": "reference/kl", "clipped": "policy/clip_frac"}
        return {names[key]: (output[key], mask) for key in names.keys() & output.keys()}

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        super().annotate(trajectories)
        if self.config.train.minibatches > 1:
            self.run.score_policy(trajectories)
            for trajectory in trajectories:
                annotations = trajectory.annotations
                annotations["old_logprobs"] = annotations.pop("student_logprobs")
        if self.config.grpo.importance_cap is not None:
            for trajectory in trajectories:
                trajectory.annotations["rollout_logprobs"] = trajectory.logprobs
        if self.reference is not None:
            self.reference.annotate(trajectories)

    def loss(self) -> Loss:
        options = self.config.grpo
        return Loss(
            policy_gradient=True,
            kl_beta=options.kl_beta,
            vocab=self.run.vocab,
            temperature=self.config.rollout.temperature,
            objective={
                "objective": "ppo_clip",
                "clip_low": options.clip_low,
                "clip_high": options.clip_high,
                "is_cap": options.importance_cap,
            },
        )


def group_advantages(rewards: np.ndarray, normalize_std: bool = True) -> np.ndarray:
    """Rewards less their group's mean, over its standard deviation (of the population) plus 1e-6 if
    `normalize_std`.

    Args:
        rewards: [P, n], a row per prompt.

    Returns:
        [P, n]; exactly 0 in a group of one, or of equal rewards.
    """
    advantages = rewards - rewards.mean(1, keepdims=True)
    if normalize_std:
        advantages = advantages / (rewards.std(1, keepdims=True) + EPSILON)
    return np.where(np.ptp(rewards, axis=1, keepdims=True) > 0, advantages, 0.0)
