"""GRPO (arXiv 2402.03300): policy gradient with advantages relative to a prompt's other samples.

The reward of a completion is its accuracy plus gamma times a length reward. Less the mean of its
group, over the group's standard deviation, it is the advantage of all its tokens. The objective is
PPO's clipped one, and a KL to the starting weights is added to the loss. There is no value function
and no filter: groups without a difference have advantage 0, and only their KL counts.

The clip has a bound for either side (arXiv 2503.14476). The trainer computes the log-probs of the
policy that sampled before the first of `train.minibatches` updates. With one update per batch the
ratio is 1 and nothing clips, so that pass is left out. `grpo.importance_cap` makes up for a rollout
engine whose log-probs differ from the trainer's. It weights each token by the ratio of the two, cut
at the cap.

The length reward is accuracy * (1 - tokens / L), L = `rollout.max_new_tokens`. It is in [0, 1), and
only for correct answers, so that a short wrong one gains nothing. On-policy SFT's paper starts from
"accuracy + gamma * length"; it was not at hand for the form. HRPO uses this form for each of its
stages (docs/specification.md, 4).

A completion cut at the limit is rewarded as it is, gets no reward, or is left out of the update
(`grpo.truncated`; the last is DAPO's overlong filtering, arXiv 2503.14476).

    torchrun --nproc_per_node=N train.py recipe=grpo [grpo.gamma=0.5] [grpo.kl_beta=0]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from recipes.errors import ConfigError
from rewards.groups import equal_groups_share, group_advantages
from rewards.length import length_reward
from rollouts.trajectory import Trajectory
from trainers.base import Trainer, max_new_tokens
from trainers.losses import Loss


class GRPO(Trainer):
    """The options are the config's section `grpo`."""

    verifies = True

    def __init__(self, run):
        super().__init__(run)
        self.reference = None
        if self.config.grpo.kl_beta > 0:
            from trainers.core.teacher import AdapterlessPolicy, Reference

            has_adapters = self.config.model.lora.rank is not None
            self.reference = AdapterlessPolicy(run) if has_adapters else Reference(run)

    @classmethod
    def check(cls, config) -> None:
        if config.rollout.samples_per_prompt < 2:
            raise ConfigError(
                f"rollout.samples_per_prompt={config.rollout.samples_per_prompt}: "
                f"recipe={config.recipe} compares samples of one prompt; give 2 or more"
            )

    def draw(self, step: int) -> list[Trajectory]:
        trajectories = super().draw(step)
        limit = max_new_tokens(self.config.rollout, step)
        for trajectory, advantages in zip(trajectories, self.advantages(trajectories, limit)):
            trajectory.annotations["advantages"] = advantages
        return trajectories

    def keeps(self, trajectory: Trajectory) -> bool:
        return self.config.grpo.truncated != "mask" or not is_truncated(trajectory)

    def has_reward(self, trajectory: Trajectory) -> bool:
        """False where `grpo.truncated` sets a completion's reward to 0."""
        return self.config.grpo.truncated != "zero_reward" or not is_truncated(trajectory)

    def advantages(self, trajectories: Sequence[Trajectory], limit: int) -> list[np.ndarray]:
        """Write each trajectory's `reward`, and return its advantages [T] float32.

        Args:
            trajectories: of a step. Those of a prompt are adjacent.
            limit: the most new tokens of a completion.
        """
        for trajectory in trajectories:
            reward = length_reward(trajectory, limit, self.config.grpo.gamma)
            reward = self.whole_reward(trajectory, reward)
            trajectory.reward = reward * self.has_reward(trajectory)
        by_trajectory = self.in_groups([t.reward for t in trajectories])
        return [
            np.full(len(t.completion_ids), advantage, np.float32)
            for t, advantage in zip(trajectories, by_trajectory)
        ]

    def in_groups(self, rewards: Sequence[float]) -> np.ndarray:
        """The advantage of each trajectory of a step [P * n] over the others of its prompt."""
        advantages = group_advantages(self._groups(rewards), self.config.grpo.normalize_std)
        return advantages.ravel()

    def _groups(self, rewards: Sequence[float]) -> np.ndarray:
        """[P, n], a row per prompt."""
        return np.array(rewards).reshape(-1, self.config.rollout.samples_per_prompt)

    def metrics(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        groups = self._groups([t.reward for t in trajectories])
        metrics = {"reward/equal_groups_frac": equal_groups_share(groups)}
        if self.config.grpo.truncated == "mask":
            metrics["rollout/kept_frac"] = float(np.mean([self.keeps(t) for t in trajectories]))
        return metrics

    def token_metrics(
        self, trajectory: Trajectory, output: Mapping[str, np.ndarray]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        mask = trajectory.annotations["mask"]
        names = {"kl": "reference/kl", "clipped": "policy/clip_frac"}
        return {metric: (output[key], mask) for key, metric in names.items() if key in output}

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


def is_truncated(trajectory: Trajectory) -> bool:
    """Whether the completion was cut at the limit of new tokens."""
    return trajectory.finish_reason == "length"
