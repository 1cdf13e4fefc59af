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

`teacher.prompt` or `teacher.prompt_column` gives the teacher another prompt than the student: one
with a worked solution, a demonstration, instructions. The teacher may then be the student itself
(`teacher.path=self`: OPSD, SDFT and their kin). A completion's ids are the student's.

`teachers` names several, which a data column assigns to rows, or which are averaged
(trainers/core/teachers.py).

`teacher.tokenizer=own` is for a teacher with another tokenizer (trainers/spans.py).

`reward.select` lets the tokens of highest score alone learn, as DIAL-OPD does (arXiv 2610.11659).
`reward.task_weight` adds the verifier's score: w_d r_t + w_r A, where A is the completion's
advantage over the other samples of its prompt, as in GRPO. With w_r = 0 it is distillation alone,
and with w_d = 0 GRPO without a KL (under `reward.terminal_stop=raw`, as `mask` leaves the stop
token out of both).

    torchrun --nproc_per_node=N train.py recipe=poweropd [reward.alpha=5] [reward.token=log_ratio]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recipes.components import TOKEN_REWARDS, TOKEN_SCORES
from recipes.errors import ConfigError
from rewards.groups import equal_groups_share, group_advantages
from rewards.selection import select_tokens
from rewards.token import Averaged, Weighted
from rollouts.trajectory import Trajectory
from trainers.base import Trainer
from trainers.core.distributed import world_size
from trainers.core.metrics import compared_logprobs, compared_tokens
from trainers.core.teacher import SELF
from trainers.core.teachers import averages_rewards, check_teachers, weights
from trainers.losses import Loss
from trainers.spans import (
    action_logprobs,
    add_rewards,
    check_own_tokenizer,
    has_own_tokenizer,
    score_spans,
    span_metrics,
)

# Added to the standard deviation of a step's rewards.
EPSILON = 1e-6


class OnPolicyDistillation(Trainer):
    """`reward.token` and `objective` choose the method.

    `reward.terminal_stop` says how the last stop token counts.
    """

    distills = True
    aligns = True

    def __init__(self, run):
        super().__init__(run)
        options = self.config.reward
        self.full = self.config.objective != "policy_gradient"
        self.spans = has_own_tokenizer(self.config)
        self.reward = self.plain_reward = self.score = None
        if not self.full:
            self.plain_reward = TOKEN_REWARDS.resolve(options.token)(options)
            self.reward = token_reward(self.config)
        if options.select.score is not None:
            self.score = TOKEN_SCORES.resolve(options.select.score)(options.select)

    @classmethod
    def check(cls, config) -> None:
        TOKEN_REWARDS.resolve(config.reward.token)
        if config.objective == "policy_gradient" and config.train.minibatches > 1:
            raise ConfigError(
                f"train.minibatches={config.train.minibatches}: a policy gradient of on-policy "
                "distillation has no importance ratio, so only the first update of a step would be "
                "right; use train.minibatches=1 with fewer train.prompts_per_step"
            )
        check_own_tokenizer(config)
        check_reward(config)
        check_teachers(config)
        check_self_teaching(config)
        check_importance(config)
        stop = config.reward.terminal_stop
        if config.objective != "policy_gradient" and stop in ("relabel", "cross_eos"):
            raise ConfigError(
                f"reward.terminal_stop={stop} rescores the sampled stop token, and "
                f"objective={config.objective} has none; use mask or raw"
            )

    @classmethod
    def needs_answers(cls, config) -> bool:
        return config.reward.task_weight > 0 and config.reward.verifier_weight != 0

    def draw(self, step: int) -> list[Trajectory]:
        trajectories = super().draw(step)
        if self.config.reward.task_weight:
            for trajectory, advantage in zip(trajectories, self.task_advantages(trajectories)):
                values = np.full(len(trajectory.completion_ids), advantage, np.float32)
                trajectory.annotations |= {"task_advantages": values, "advantages": values}
        return trajectories

    def task_advantages(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        """The weighted advantage of each trajectory of a step [P * n] over those of its prompt."""
        options = self.config.reward
        advantages = group_advantages(self._scores(trajectories), options.task_normalize_std)
        return options.task_weight * advantages.ravel()

    def _scores(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        """The task reward, [P, n], a row per prompt."""
        rewards = [self.whole_reward(trajectory, trajectory.score) for trajectory in trajectories]
        scores = np.array(rewards, dtype=np.float64)
        return scores.reshape(-1, self.config.rollout.samples_per_prompt)

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        mode = self.config.reward.terminal_stop
        for trajectory in trajectories:
            annotate_stop(trajectory, mode, self.run.teacher_stop)
            trajectory.annotations["mask"][: self.config.teacher.skip_tokens] = False
        if self.config.reward.importance_cap is not None:
            for trajectory in trajectories:
                trajectory.annotations["rollout_logprobs"] = trajectory.logprobs
        self.run.teacher.annotate(trajectories, hidden=self.full)
        standardises = self.reward is not None and self.reward.window
        if self.spans or standardises or self.score is not None:
            self.run.score_policy(trajectories)
        if self.spans:
            score_spans(trajectories)
        if standardises:
            standardise(trajectories, self.reward, self.config.reward.teacher_weight)
        elif self.spans and self.reward is not None:
            add_rewards(trajectories, self.reward)
        if self.score is not None:
            for trajectory in trajectories:
                select(trajectory, self.score, self.config.reward.select.keep)

    def metrics(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        if not self.config.reward.task_weight:
            return {}
        return {"reward/equal_groups_frac": equal_groups_share(self._scores(trajectories))}

    def token_metrics(
        self, trajectory: Trajectory, output: Mapping[str, np.ndarray]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        annotations = trajectory.annotations
        mask, compared = annotations["mask"], compared_tokens(trajectory)
        teacher, student = annotations["teacher_logprobs"], compared_logprobs(trajectory, output)
        if self.spans:
            metrics = span_metrics(trajectory)
        else:
            metrics = {"teacher/tv": (total_variation(teacher, student), compared)}
        if self.config.teachers:
            metrics |= self.run.teacher.token_metrics(trajectory, student, self.plain_reward)
        if self.score is not None:
            metrics["reward/selected_frac"] = (mask.astype(np.float32), compared)
        if self.full:
            return metrics
        rewards, task = output["rewards"], annotations.get("task_advantages")
        if task is None:
            metrics["reward/dead_frac"] = ((rewards == 0).astype(np.float32), mask)
        else:
            metrics["reward/teacher_mean"] = (rewards - task, mask)
            metrics["reward/task_abs_mean"] = (np.abs(task), mask)
        return metrics

    def loss(self) -> Loss:
        temperature, vocab = self.config.rollout.temperature, self.run.vocab
        if not self.full:
            return Loss(
                policy_gradient=True,
                # Rewards of spans are in the advantages.
                reward=None if self.spans else self.reward,
                temperature=temperature,
                vocab=vocab,
                objective={"is_cap": self.config.reward.importance_cap},
            )
        return Loss(
            divergence=full_objective(self.config),
            teacher_head=self.run.teacher.head,
            temperature=temperature,
            vocab=vocab,
        )


def token_reward(config) -> Any:
    """The token reward with its weight, averaged over several teachers; None for a weight of 0."""
    options = config.reward
    reward = TOKEN_REWARDS.resolve(options.token)(options)
    # A weight of 1 keeps a reward that the head's kernel computes. A standardised one gets its
    # weight when it is standardised.
    if options.teacher_weight != 1 and not reward.window:
        reward = Weighted(reward, options.teacher_weight) if options.teacher_weight else None
    averaged = reward is not None and averages_rewards(config)
    return Averaged(reward, weights(config)) if averaged else reward


def check_reward(config) -> None:
    """Raises ConfigError: keys of the sampled reward that are impossible together."""
    options, samples = config.reward, config.rollout.samples_per_prompt
    sampled = {
        "reward.select.score": options.select.score is not None,
        "reward.task_weight": options.task_weight > 0,
        "reward.teacher_weight": options.teacher_weight != 1,
    }
    for name, is_set in sampled.items():
        if is_set and config.objective != "policy_gradient":
            raise ConfigError(
                f"{name} is of the reward of sampled tokens, and objective={config.objective} "
                "compares whole distributions; use objective=policy_gradient"
            )
    if options.task_weight and samples < 2:
        raise ConfigError(
            f"rollout.samples_per_prompt={samples}: reward.task_weight={options.task_weight:g} "
            "compares samples of one prompt; give 2 or more"
        )
    if options.functions and not options.task_weight:
        raise ConfigError("reward.functions are a task reward, and reward.task_weight=0; raise it")
    if not options.teacher_weight and not options.task_weight:
        raise ConfigError(
            "reward.teacher_weight=0 and reward.task_weight=0 leave no reward; raise one of them"
        )


def check_self_teaching(config) -> None:
    """Raises ConfigError: keys of a student that teaches itself that are impossible together."""
    teacher, where = config.teacher, f"teacher.weights={config.teacher.weights}"
    if teacher.weights == "frozen":
        return
    if teacher.path != SELF:
        raise ConfigError(
            f"{where} is of a student that teaches itself; use teacher.path={SELF}, or "
            "teacher.weights=frozen"
        )
    if teacher.weights == "base" and config.model.lora.rank is None:
        raise ConfigError(
            f"{where} are the weights without LoRA's adapters, and there are none; set "
            "model.lora.rank, or use teacher.weights=frozen"
        )
    if teacher.weights == "current" and teacher.prompt is teacher.prompt_column is None:
        raise ConfigError(
            f"{where}: teacher and student are the same and read the same, so there is nothing to "
            "learn; give the teacher more with teacher.prompt or teacher.prompt_column"
        )
    if config.train.minibatches > 1:
        raise ConfigError(
            f"train.minibatches={config.train.minibatches}: {where} change with the first update "
            "of a step; use train.minibatches=1"
        )


def total_variation(teacher_logprobs: np.ndarray, student_logprobs: np.ndarray) -> np.ndarray:
    """max(0, 1 - p/q) of tokens that the student drew, [T].

    Its mean is an unbiased estimate of the total variation between both (arXiv 2609.08341).
    """
    gap = np.minimum(teacher_logprobs.astype(np.float64) - student_logprobs, 0)
    return -np.expm1(gap)


def select(trajectory: Trajectory, score, share: float) -> None:
    """Mask all but the tokens of highest score, and write which were `candidates` [T] bool.

    Args:
        trajectory: with `mask`, `teacher_logprobs` and `student_logprobs`.
        score: of tokens (rewards/selection.py).
        share: of its unmasked tokens, to keep.
    """
    annotations = trajectory.annotations
    mask = annotations["mask"]
    scores = score(annotations["teacher_logprobs"], annotations["student_logprobs"])
    annotations |= {"candidates": mask, "mask": select_tokens(scores, mask, share)}


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


def standardise(trajectories: Sequence[Trajectory], reward, weight: float = 1.0) -> None:
    """Add rewards standardised over the step's unmasked tokens to `advantages` [T] float32.

    A collective. Tokens with an infinite reward do not enter the moments.

    Args:
        trajectories: this rank's, with `mask` and what `action_logprobs` reads.
        reward: a token reward (rewards/token.py).
        weight: of the standardised reward.
    """
    rewards, counted = [], [np.zeros(0)]
    for trajectory in trajectories:
        annotations = trajectory.annotations
        values = reward(*action_logprobs(reward, annotations)).double().numpy()
        rewards.append(values)
        counted.append(values[annotations["mask"]])
    mean, std = moments(np.concatenate(counted))
    for trajectory, values in zip(trajectories, rewards):
        advantages = weight * (values - mean) / (std + EPSILON)
        others = trajectory.annotations.get("advantages", 0)
        trajectory.annotations["advantages"] = (advantages + others).astype(np.float32)


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
