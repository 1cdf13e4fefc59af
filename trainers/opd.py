"""On-policy distillation: PowerOPD, vanilla OPD, their baselines, and the full-vocabulary
objectives.

The student samples; the teacher scores the sampled tokens; each token's reward, a bounded function
of the two probabilities (PowerOPD, arXiv 2606.17199) or their log-ratio (vanilla), weights its
log-prob in a plain REINFORCE loss. There is one optimizer step per rollout batch, hence no
importance ratio and no clip; no reference model, value function, discount or advantage
normalisation, as in the paper: the token reward is dense and already relative to the student.
`objective` replaces the sampled reward by an exact divergence between the two full distributions on
the student's samples.

    torchrun --nproc_per_node=N train.py recipe=poweropd [reward.alpha=5] [reward.token=log_ratio]
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
import torch.distributed as dist

from recipes.components import TOKEN_REWARDS
from recipes.errors import ConfigError
from rollouts.trajectory import Trajectory
from trainers.base import Trainer
from trainers.core.distributed import world_size
from trainers.losses import Loss


class OnPolicyDistillation(Trainer):
    """`reward.token` and `objective` choose the method; `reward.terminal_stop` how the last stop
    token counts."""

    distills = True

    def __init__(self, run):
        super().__init__(run)
        self.full = self.config.objective != "policy_gradient"
        self.reward = (
            None
            if self.full
            else TOKEN_REWARDS.resolve(self.config.reward.token)(self.config.reward)
        )

    @classmethod
    def check(cls, config) -> None:
        TOKEN_REWARDS.resolve(config.reward.token)
        if config.objective != "policy_gradient" and config.reward.terminal_stop in (
            "relabel",
            "cross_eos",
        ):
            raise ConfigError(
                f"reward.terminal_stop={config.reward.terminal_stop} rescores the sampled stop token, and "
                f"objective={config.objective} has none; use mask or raw"
            )

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        for trajectory in trajectories:
            annotate_stop(trajectory, self.config.reward.terminal_stop, self.run.teacher_stop)
        self.run.teacher.annotate(trajectories, hidden=self.full)
        if self.reward is not None and self.reward.window:
            self.run.score_policy(trajectories)
            standardise(trajectories, self.reward)

    def loss(self) -> Loss:
        shared = dict(temperature=self.config.rollout.temperature, vocab=self.run.vocab)
        if not self.full:
            return Loss(policy_gradient=True, reward=self.reward, **shared)
        kind, options = self.config.objective, self.config.divergence
        if kind == "topk":
            divergence = {
                "divergence": options.top_k_direction,
                "top_k": options.top_k,
                "support": options.top_k_support,
                "tail": options.top_k_tail,
            }
        elif kind == "power_full":
            divergence = {
                "divergence": "power",
                "alpha": self.config.reward.alpha,
                "normalization": self.config.reward.normalization,
            }
        elif kind == "jsd":
            divergence = {"divergence": "jsd", "beta": options.jsd_beta}
        else:
            divergence = {"divergence": kind}
        return Loss(divergence=divergence, teacher_head=self.run.teacher.policy.head, **shared)


def annotate_stop(trajectory: Trajectory, mode: str, teacher_stop: int) -> None:
    """Write `mask`, `targets` and `teacher_targets` [T]: which tokens count, and as which ids each
    model scores them.

    A base student ends on another token than its chat teacher, which gives it almost no
    probability: `raw` lets that punish every correct stop; `mask` leaves a final stop token out of
    the loss; `relabel` scores it as the teacher's stop in both models; `cross_eos` does so in the
    teacher only. (PowerOPD's code; docs/specification.md, 1.)"""
    ids = np.asarray(trajectory.completion_ids, dtype=np.int64)
    mask, targets, teacher_targets = trajectory.sampled_mask, ids.copy(), ids.copy()
    if trajectory.finish_reason == "stop" and len(ids):
        if mode == "mask":
            mask[-1] = False
        elif mode == "relabel":
            targets[-1] = teacher_targets[-1] = teacher_stop
        elif mode == "cross_eos":
            teacher_targets[-1] = teacher_stop
    trajectory.annotations |= {"mask": mask, "targets": targets, "teacher_targets": teacher_targets}


def standardise(trajectories: Sequence[Trajectory], reward) -> None:
    """Write `advantages`: the reward standardised over the unmasked tokens of all ranks."""
    raw = []
    for trajectory in trajectories:
        notes = trajectory.annotations
        raw.append(
            reward(
                torch.from_numpy(notes["teacher_logprobs"]),
                torch.from_numpy(notes["student_logprobs"]),
            )
            .double()
            .numpy()
        )
    kept = np.concatenate(
        [r[t.annotations["mask"]] for r, t in zip(raw, trajectories)] or [np.zeros(0)]
    )
    kept = kept[np.isfinite(kept)]
    moments = torch.tensor([len(kept), kept.sum(), np.square(kept).sum()], dtype=torch.float64)
    if world_size() > 1:
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        moments = moments.to(device)
        dist.all_reduce(moments)
    count, total, squares = moments.tolist()
    mean = total / max(count, 1)
    std = max(squares / max(count, 1) - mean**2, 0) ** 0.5
    for trajectory, values in zip(trajectories, raw):
        trajectory.annotations["advantages"] = ((values - mean) / (std + 1e-6)).astype(np.float32)
