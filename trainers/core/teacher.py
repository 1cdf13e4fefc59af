"""A frozen model in the trainer's process that annotates the policy's completions: a teacher, or a
reference.

It shares the policy's split into backbone and head, hence its place here and not among the
rollouts."""

from __future__ import annotations

from typing import Callable, Sequence

import torch

from rollouts.trajectory import Trajectory
from trainers.core.batching import pack, split, unpack
from trainers.core.policy import DTYPES, load_policy
from trainers.losses import score_tokens


class FrozenModel:
    """Runs over trajectories in packed micro-batches of the same token budget as the update's."""

    def __init__(self, path: str, dtype: str, config, device: torch.device, vocab: int):
        self.config, self.device, self.vocab = config, device, vocab
        self.policy = (
            load_policy(
                path,
                DTYPES[dtype],
                device,
                config.model.attn_implementation,
                config.streaming.layout,
            )
            .eval()
            .requires_grad_(False)
        )

    @torch.no_grad()
    def write(self, trajectories: Sequence[Trajectory], function: Callable) -> None:
        """Write annotations: `function(hidden [T, H], batch)` gives each name's values [T, …]."""
        for members in split(
            [t.length for t in trajectories], self.config.train.tokens_per_microbatch
        ):
            batch = pack(trajectories, members, self.device)
            for name, tensor in function(self.policy.hidden(batch), batch).items():
                for member, array in zip(members, unpack(batch, trajectories, tensor)):
                    trajectories[member].annotations[name] = array

    def score(self, hidden: torch.Tensor, batch, targets: torch.Tensor):
        return score_tokens(
            self.policy.head,
            hidden,
            batch,
            targets=targets,
            temperature=self.config.rollout.temperature,
            vocab=self.vocab,
        )


class Teacher(FrozenModel):
    """`teacher.path`."""

    def __init__(self, config, device: torch.device, vocab: int):
        super().__init__(config.teacher.path, config.teacher.dtype, config, device, vocab)

    def annotate(self, trajectories: Sequence[Trajectory], hidden: bool = False) -> None:
        """Write `teacher_logprobs` and `teacher_max_logprobs` [T] (float32, nats) on each
        trajectory, of the ids in its annotation `teacher_targets`; with `hidden`, also
        `teacher_hidden` [T, H_teacher] float32, from which the full distribution can be had at V/H
        of its size."""

        def values(states, batch):
            scored = self.score(states, batch, batch.annotations["teacher_targets"])
            found = {
                "teacher_logprobs": scored.logprobs,
                "teacher_max_logprobs": scored.max_logprob,
            }
            return found | ({"teacher_hidden": states.float()} if hidden else {})

        self.write(trajectories, values)


class Reference(FrozenModel):
    """The weights that a run started from, also after a resume: `model.path`, in the policy's
    compute dtype."""

    def __init__(self, config, device: torch.device, vocab: int):
        super().__init__(config.model.path, config.model.dtype, config, device, vocab)

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        """Write `reference_logprobs` [T] (float32, nats), of the sampled tokens."""
        self.write(
            trajectories,
            lambda states, batch: {
                "reference_logprobs": self.score(states, batch, batch.targets).logprobs
            },
        )
