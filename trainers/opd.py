"""On-policy distillation: PowerOPD, vanilla OPD, their baselines, the full-vocabulary objectives.

The student samples, and the teacher scores the sampled tokens. A token's reward weights its
log-prob in a plain REINFORCE loss. In PowerOPD (arXiv 2606.17199) the reward is a bounded function
of the two probabilities; in vanilla OPD it is their log-ratio.

There is one optimizer step per rollout batch, hence no ratio to an older policy and no clip. More
updates (`train.minibatches`) are refused. As in the paper, there is no reference model, value
function, discount or advantage normalisation: the token reward is dense and already relative to the
student.

`reward.importance_cap` makes up for a rollout engine whose log-probs differ from the trainer's, as
where it computes in another precision. It weights each token by the ratio of the two, cut at the
cap.

`objective` replaces the sampled reward by an exact divergence between the two full distributions on
the student's samples.

    torchrun --nproc_per_node=N train.py recipe=poweropd [reward.alpha=5] [reward.token=log_ratio]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recipes.components import TOKEN_REWARDS
from recipes.errors import ConfigError
from rollouts.trajectory import Trajectory
from trainers.base import Trainer
from trainers.core.distributed import world_size
from trainers.losses import Loss

# Added to the standard deviation of a step's rewards.
EPSILON = 1e-6


class OnPolicyDistillation(Trainer):
    """`reward.token` and `objective` choose the method.

    `reward.terminal_stop` says how the last stop token counts.
    """

    distills = True

    def __init__(self, run):
        super().__init__(run)
        self.full = self.config.objective != "policy_gradient"
        self.reward = None
        if not self.full:
            options = self.config.reward
            self.reward = TOKEN_REWARDS.resolve(options.token)(options)

    @classmethod
    def check(cls, config) -> None:
        TOKEN_REWARDS.resolve(config.reward.token)
        if config.objective == "policy_gradient" and config.train.minibatches > 1:
            raise ConfigError(
                f"train.minibatches={config.train.minibatches}: a policy gradient of on-policy "
                "distillation has no importance ratio, so only the first update of a step would be "
                "right; use train.minibatches=1 with fewer train.prompts_per_step"
            )
        check_importance(config)
        stop = config.reward.terminal_stop
        if config.objective != "policy_gradient" and stop in ("relabel", "cross_eos"):
            raise ConfigError(
                f"reward.terminal_stop={stop} rescores the sampled stop token, and "
                f"objective={config.objective} has none; use mask or raw"
            )

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        mode = self.config.reward.terminal_stop
        for trajectory in trajectories:
            annotate_stop(trajectory, mode, self.run.teacher_stop)
        if self.config.reward.importance_cap is not None:
            for trajectory in trajectories:
                trajectory.annotations["rollout_logprobs"] = trajectory.logprobs
        self.run.teacher.annotate(trajectories, hidden=self.full)
        if self.reward is not None and self.reward.window:
            self.run.score_policy(trajectories)
            standardise(trajectories, self.reward)

    def loss(self) -> Loss:
        temperature, vocab = self.config.rollout.temperature, self.run.vocab
        if not self.full:
            return Loss(
                policy_gradient=True,
                reward=self.reward,
                temperature=temperature,
                vocab=vocab,
                objective={"is_cap": self.config.reward.importance_cap},
            )
        return Loss(
            divergence=full_objective(self.config),
            teacher_head=self.run.teacher.policy.head,
            temperature=temperature,
            vocab=vocab,
        )


def check_importance(config) -> None:
    """Raises ConfigError: `reward.importance_cap` has no ratio to cap."""
    cap, stop = config.reward.importance_cap, config.reward.terminal_stop
    if cap is None:
        return
    if config.objective != "policy_gradient":
        raise ConfigError(
            f"reward.importance_cap={cap:g} weights sampled tokens, and objective="
            f"{config.objective} compares whole distributions; use objective=policy_gradient"
        )
    if stop == "relabel":
        raise ConfigError(
            f"reward.importance_cap={cap:g} compares the log-probs of the sampled token, and "
            "reward.terminal_stop=relabel scores another one; use mask, cross_eos or raw"
        )


def full_objective(config) -> dict[str, Any]:
    """The kernels' keyword arguments for the divergence that `objective` names."""
    name, options, reward = config.objective, config.divergence, config.reward
    if name == "topk":
        return {
            "divergence": options.top_k_direction,
            "top_k": options.top_k,
            "support": options.top_k_support,
            "tail": options.top_k_tail,
        }
    if name == "power_full":
        return {
            "divergence": "power",
            "alpha": reward.alpha,
            "normalization": reward.normalization,
        }
    if name == "jsd":
        return {"divergence": "jsd", "beta": options.jsd_beta}
    return {"divergence": name}


def annotate_stop(trajectory: Trajectory, mode: str, teacher_stop: int) -> None:
    """Write `mask` (bool), `targets` and `teacher_targets` (int64), [T].

    They say which tokens count, and as which ids each model scores them. A base student ends on
    another token than its chat teacher, which gives that token almost no probability. (PowerOPD's
    code; docs/specification.md, 1.)

    Args:
        trajectory: a completion.
        mode: `raw` lets the teacher punish every correct stop. `mask` leaves a final stop token out
            of the loss. `relabel` scores it as the teacher's stop in both models. `cross_eos` does
            so in the teacher only.
        teacher_stop: the id of the teacher's end token.
    """
    targets = np.array(trajectory.completion_ids, dtype=np.int64)
    mask, teacher_targets = trajectory.sampled_mask, targets.copy()
    if trajectory.finish_reason == "stop" and len(targets):
        if mode == "mask":
            mask[-1] = False
        elif mode == "relabel":
            targets[-1] = teacher_targets[-1] = teacher_stop
        elif mode == "cross_eos":
            teacher_targets[-1] = teacher_stop
    trajectory.annotations |= {"mask": mask, "targets": targets, "teacher_targets": teacher_targets}


def standardise(trajectories: Sequence[Trajectory], reward) -> None:
    """Write `advantages` [T] float32: rewards standardised over the step's unmasked tokens.

    A collective. Tokens with an infinite reward do not enter the moments.

    Args:
        trajectories: this rank's, with `mask`, `teacher_logprobs` and `student_logprobs`.
        reward: a token reward (rewards/token.py).
    """
    rewards, counted = [], [np.zeros(0)]
    for trajectory in trajectories:
        annotations = trajectory.annotations
        teacher, student = (
            torch.from_numpy(annotations[name]) for name in ("teacher_logprobs", "student_logprobs")
        )
        values = reward(teacher, student).double().numpy()
        rewards.append(values)
        counted.append(values[annotations["mask"]])
    mean, std = moments(np.concatenate(counted))
    for trajectory, values in zip(trajectories, rewards):
        advantages = (values - mean) / (std + EPSILON)
        trajectory.annotations["advantages"] = advantages.astype(np.float32)


def moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of all ranks' finite values [n] float64. A collective."""
    finite = values[np.isfinite(values)]
    sums = torch.tensor([len(finite), finite.sum(), np.square(finite).sum()], dtype=torch.float64)
    if world_size() > 1:
        # NCCL reduces tensors on a GPU alone.
        sums = sums.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(sums)
    count, total, squares = sums.tolist()
    # A step may have no finite reward at all.
    count = max(count, 1)
    mean = total / count
    return mean, max(squares / count - mean**2, 0) ** 0.5
