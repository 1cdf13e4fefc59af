"""HRPO, the policy optimisation of AdaSR (arXiv 2606.14694): GRPO with advantages of its own for
each stage.

A streaming reasoner writes thoughts while it reads and a deep segment when it has read all. Beside
the global advantage of a completion, its streaming and its deep tokens have a local one each, from
a reward of their own (rewards/streaming.py), so that a stage is not blamed for the other:

    R_g = acc + w fmt_s fmt_d     R_s = w fmt_s + alpha think_s + c beta think_d     R_d = w fmt_d +
    acc + beta think_d A = lambda A_local + (1 - lambda) A_g       each of R_g, R_s, R_d less its
    group's mean, over the group's std

There is no public code, and the paper's text was not at hand: this form is ours (methods.md, 4). c
= `hrpo.deep_credit` is an addition to it: what a thought leaves undone has to be done in the deep
segment, so a thought answers for that segment's length as well. With c = 0 nothing tells a
streaming token that thinking now saves time later, the shortest thought is <skip>, and a model
learns to think only when it has read all (docs/log.md). Ours are also two of the three
granularities, which the paper names:

- stage: as above;
- sentence: a slot's tokens have the local advantage of that slot's own reward, w closed + alpha acc
  (1 - tokens / cap) + c beta think_d, among the same slot of the group's other completions, which
  read the same sentence; the deep segment as above;
- boundary_token: only the tokens that end something (<EOT>, <skip>, <EOR>, <EOA>) have their
  stage's local advantage, since they are what decides when to think and for how long; the others
  have A_g alone.

With lambda = 0, recipe=adasr_grpo, it is GRPO on R_g. The loss, PPO's clip, the KL and the
importance weight are GRPO's, under the layout that sampled; what was forced, or read, is masked.

    torchrun --nproc_per_node=N train.py recipe=adasr [hrpo.local_weight=0.5] [hrpo.granularity=sentence]
"""

from __future__ import annotations

from typing import Sequence

import numpy as np

from rewards.streaming import judge
from rollouts.streaming.tokens import Protocol
from rollouts.trajectory import Trajectory
from trainers.grpo import GRPO, group_advantages
from trainers.streaming_sft import check_layout


class HRPO(GRPO):
    """The options are the config's sections `hrpo` and, but for gamma, `grpo`."""

    @classmethod
    def check(cls, config) -> None:
        super().check(config)
        check_layout(config)

    def advantages(self, drawn: Sequence[Trajectory], limit: int) -> list[np.ndarray]:
        options, weight = self.config.hrpo, self.config.hrpo.local_weight
        tokenizer, stop_ids = self.parts.tokenizer, self.parts.stop_ids
        protocol = Protocol.of(tokenizer)
        ends = [protocol.eot, protocol.skip, protocol.eor, protocol.eoa, *stop_ids]
        self.stages = [
            judge(
                trajectory,
                protocol,
                tokenizer.decode,
                stop_ids,
                self.config.streaming.max_thought_tokens,
                limit,
            )
            for trajectory in drawn
        ]
        rewards = [stages.rewards(options) for stages in self.stages]
        whole, streaming, deep = (self.in_groups(column) for column in zip(*rewards))
        by_sentence = (
            self._by_sentence()
            if options.granularity == "sentence"
            else [
                np.full(len(stages.lengths), local) for stages, local in zip(self.stages, streaming)
            ]
        )
        made = []
        for index, trajectory in enumerate(drawn):
            trajectory.reward = rewards[index][0]
            has_local = trajectory.slots >= 0
            if options.granularity == "boundary_token":
                has_local &= np.isin(trajectory.completion_ids, ends)
            by_slot = np.append(by_sentence[index], deep[index])
            local = np.where(has_local, by_slot[trajectory.slots], whole[index])
            made.append((weight * local + (1 - weight) * whole[index]).astype(np.float32))
        return made

    def _by_sentence(self) -> list[np.ndarray]:
        """Each completion's advantages [N] of its slots, among the same slots of its group."""
        size, made = self.config.rollout.samples_per_prompt, []
        for start in range(0, len(self.stages), size):
            group = np.stack(
                [
                    stages.sentence_rewards(self.config.hrpo)
                    for stages in self.stages[start : start + size]
                ]
            )
            made += list(group_advantages(group.T, self.config.grpo.normalize_std).T)
        return made

    def metrics(self, drawn: Sequence[Trajectory]) -> dict[str, float]:
        stages = self.stages
        return super().metrics(drawn) | {
            "rollout/streaming_length_mean": float(np.mean([s.lengths.sum() for s in stages])),
            "rollout/deep_length_mean": float(np.mean([s.deep_length for s in stages])),
            "rollout/skip_frac": float(np.concatenate([s.skipped for s in stages]).mean()),
            "reward/format": float(np.mean([s.format for s in stages])),
            "reward/thinking": float(np.mean([s.thoughts.mean() + s.deep_thought for s in stages])),
        }
