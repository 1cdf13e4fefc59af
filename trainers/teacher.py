"""The teacher: a frozen model in the trainer's process that annotates the student's completions.

It shares the policy's split into backbone and head, hence its place here and not among the rollouts.
"""
from __future__ import annotations

from typing import Sequence

import torch

from rollouts.trajectory import Trajectory
from trainers.batching import pack, split, unpack
from trainers.losses import score_tokens
from trainers.policy import DTYPES, load_policy


class Teacher:
    """Scores completions in packed micro-batches of the same token budget as the update's."""

    def __init__(self, config, device: torch.device, vocab: int):
        self.config, self.device, self.vocab = config, device, vocab
        self.policy = load_policy(config.teacher.path, DTYPES[config.teacher.dtype], device,
                                  config.model.attn_implementation).eval().requires_grad_(False)

    @torch.no_grad()
    def annotate(self, trajectories: Sequence[Trajectory], hidden: bool = False) -> None:
        """Write `teacher_logprobs` and `teacher_max_logprobs` [T] (float32, nats) on each trajectory, of the ids in
        its annotation `teacher_targets`; with `hidden`, also `teacher_hidden` [T, H_teacher] float32, from which
        the full distribution can be had at V/H of its size."""
        groups = split([t.length for t in trajectories], self.config.train.tokens_per_microbatch)
        for members in groups:
            batch = pack(trajectories, members, self.device)
            states = self.policy.hidden(batch)
            scored = score_tokens(self.policy.head, states, batch, targets=batch.annotations["teacher_targets"],
                                  temperature=self.config.rollout.temperature, vocab=self.vocab)
            values = {"teacher_logprobs": scored.logprobs, "teacher_max_logprobs": scored.max_logprob}
            if hidden:
                values["teacher_hidden"] = states.float()
            for name, tensor in values.items():
                for member, array in zip(members, unpack(batch, trajectories, tensor)):
                    trajectories[member].annotations[name] = array
