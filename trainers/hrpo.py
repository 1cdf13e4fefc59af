"""HRPO, the policy optimisation of AdaSR (arXiv 2606.14694): GRPO with advantages for each stage.

A streaming reasoner writes thoughts while it reads, and a deep segment when it has read all. Beside
the global advantage of a completion, its streaming and its deep tokens have a local one each. Each
comes from a reward of its own (rewards/streaming.py), so that a stage is not blamed for the other:

    R_g = acc + w fmt_s fmt_d
    R_s = w fmt_s + alpha think_s + c beta think_d
    R_d = w fmt_d + acc + beta think_d
    A   = lambda A_local + (1 - lambda) A_g

Each A is its reward less the group's mean, over the group's standard deviation.

We found no code for it, and the paper's text was not at hand: this form is ours
(docs/specification.md, 4). c = `hrpo.deep_credit` is an addition to it. What a thought leaves
undone has to be done in the deep segment, so a thought answers for that segment's length as well.
With c = 0 nothing tells a streaming token that thinking now saves time later. The shortest thought
is <skip>, and a model learns to think only when it has read all (docs/log.md). Ours are also two of
the three granularities, which the paper names:

- stage: as above;
- sentence: a slot's tokens have the local advantage of that slot's own reward,
  w closed + alpha acc (1 - tokens / cap) + c beta think_d, among the same slot of the group's other
  completions, which read the same sentence; the deep segment as above;
- boundary_token: only the tokens that end something (<EOT>, <skip>, <EOR>, <EOA>) have their
  stage's local advantage, since they decide when to think and for how long; the others have A_g
  alone.

With lambda = 0, recipe=adasr_grpo, it is GRPO on R_g. The loss, PPO's clip, the KL and the
importance weight are GRPO's, under the layout that sampled. What was forced, or read, is masked.

    torchrun --nproc_per_node=N train.py recipe=adasr [hrpo.local_weight=0.5]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rewards.groups import group_advantages
from rewards.streaming import Stages, score_stages
from rollouts.streaming.tokens import Protocol
from rollouts.trajectory import Trajectory
from trainers.grpo import GRPO


class HRPO(GRPO):
    """The options are the config's sections `hrpo` and, but for gamma, `grpo`."""

    layouts = ("grouped", "interleaved", "batch")

    @classmethod
    def needs_answers(cls, config) -> bool:
        # Thoughts are rewarded only where the answer is right.
        return True

    def advantages(self, trajectories: Sequence[Trajectory], limit: int) -> list[np.ndarray]:
        options = self.config.hrpo
        self.stages = self.measure(trajectories, limit)
        # 1, or 0 where a completion gets no reward.
        self.factors = [float(self.has_reward(trajectory)) for trajectory in trajectories]
        rewards = [
            [factor * reward for reward in stages.rewards(options)]
            for factor, stages in zip(self.factors, self.stages)
        ]
        whole, streaming, deep = (self.in_groups(column) for column in zip(*rewards))
        if options.granularity == "sentence":
            of_slots = self.sentence_advantages()
        else:
            counts = [len(stages.lengths) for stages in self.stages]
            of_slots = [np.full(count, local) for count, local in zip(counts, streaming)]
        ends, advantages = self.end_tokens(), []
        for index, trajectory in enumerate(trajectories):
            trajectory.reward = rewards[index][0]
            # The deep segment is slot N.
            of_slot = np.append(of_slots[index], deep[index])
            has_local = self.has_local_advantage(trajectory, ends)
            local = np.where(has_local, of_slot[trajectory.slots], whole[index])
            weight = options.local_weight
            mixed = weight * local + (1 - weight) * whole[index]
            advantages.append(mixed.astype(np.float32))
        return advantages

    def measure(self, trajectories: Sequence[Trajectory], limit: int) -> list[Stages]:
        """What each completion is worth, stage by stage; `limit` is that of the deep segment."""
        tokenizer = self.run.tokenizer
        protocol, longest = Protocol.of(tokenizer), self.config.streaming.max_thought_tokens
        return [
            replace(
                score_stages(t, protocol, tokenizer.decode, self.run.stop_ids, longest, limit),
                answer_reward=self.whole_reward(t, t.score),
            )
            for t in trajectories
        ]

    def end_tokens(self) -> list[int]:
        """The tokens that end a thought, the deep reasoning or the completion."""
        protocol = Protocol.of(self.run.tokenizer)
        return [protocol.eot, protocol.skip, protocol.eor, protocol.eoa, *self.run.stop_ids]

    def has_local_advantage(self, trajectory: Trajectory, ends: Sequence[int]) -> np.ndarray:
        """[T] bool: the tokens that a local advantage reaches."""
        written = trajectory.slots >= 0
        if self.config.hrpo.granularity != "boundary_token":
            return written
        return written & np.isin(trajectory.completion_ids, ends)

    def sentence_advantages(self) -> list[np.ndarray]:
        """Each completion's advantages [N] of its slots, among the same slots of its group."""
        size, advantages = self.config.rollout.samples_per_prompt, []
        for start in range(0, len(self.stages), size):
            group = range(start, start + size)
            # [n, N]: every completion of a prompt has a slot for each of its sentences.
            rewards = np.stack([self.sentence_rewards(index) for index in group])
            normalize_std = self.config.grpo.normalize_std
            advantages += list(group_advantages(rewards.T, normalize_std).T)
        return advantages

    def sentence_rewards(self, index: int) -> np.ndarray:
        """[N], the reward of each slot of a completion of the step."""
        return self.factors[index] * self.stages[index].sentence_rewards(self.config.hrpo)

    def metrics(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        stages = self.stages
        thinking = [s.thoughts.mean() + s.deep_thought for s in stages]
        return super().metrics(trajectories) | {
            "rollout/streaming_length_mean": float(np.mean([s.lengths.sum() for s in stages])),
            "rollout/deep_length_mean": float(np.mean([s.deep_length for s in stages])),
            "rollout/skip_frac": float(np.concatenate([s.skipped for s in stages]).mean()),
            "reward/format": float(np.mean([s.format for s in stages])),
            "reward/thinking": float(np.mean(thinking)),
        }
