"""Distillation from a teacher with another tokenizer: an action is a span of tokens.

The student's and the teacher's tokens of a completion are aligned in spans s of the same bytes
(trainers/core/retokenized.py). With the token reward r, and both log-probs summed over the tokens
of the span:

    r_s = r(log p_s, log q_s)        loss = - sum_s r_s log q_s / N

Each student token of the span gets r_s as its advantage, as log q_s is the sum over them. N counts
the student's tokens. A span counts where all its tokens do. Where each span is one token, this is
distillation from a teacher with the student's tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from recipes.errors import ConfigError
from rollouts.trajectory import Trajectory
from trainers.core.teacher import SELF
from trainers.losses import judged


def has_own_tokenizer(config) -> bool:
    """Whether the teacher reads text in its own tokens."""
    return config.teacher.tokenizer == "own"


def check_own_tokenizer(config) -> None:
    """Raises ConfigError: what has no meaning where tokens are not the same."""
    if not has_own_tokenizer(config):
        return
    reward, layout = config.reward, getattr(getattr(config, "streaming", None), "layout", None)
    refused = {
        f"objective={config.objective} compares distributions over the same tokens; use "
        "objective=policy_gradient": config.objective != "policy_gradient",
        f"rollout.temperature={config.rollout.temperature:g} changes each tokenizer's tokens "
        "otherwise; use rollout.temperature=1": config.rollout.temperature != 1,
        f"teachers.{next(iter(config.teachers), 'NAME')} is of several teachers with the student's "
        "tokenizer; name one in teacher.path": bool(config.teachers),
        f"teacher.path={SELF} has the student's tokenizer; use teacher.tokenizer=shared": (
            config.teacher.path == SELF
        ),
        f"streaming.layout={layout} reads a source in steps of the student's tokens; use "
        "streaming.layout=null": layout is not None,
        f"reward.select.score={reward.select.score} selects tokens, and rewards are of spans of "
        "them; leave it out": reward.select.score is not None,
        "reward.terminal_stop=relabel lets the student score the teacher's end token, which it has "
        "not; use mask, raw or cross_eos": reward.terminal_stop == "relabel",
        f"reward.importance_cap={reward.importance_cap} weights tokens, and rewards are of spans "
        "of them; leave it out": reward.importance_cap is not None,
    }
    for reason, wrong in refused.items():
        if wrong:
            raise ConfigError(f"teacher.tokenizer=own: {reason}")


def score_spans(trajectories: Sequence[Trajectory]) -> None:
    """Write what the student's log-probs make of the spans.

    These are `span_student_logprobs` [T], the sum over the token's span, and `teacher_logprobs`
    [T], in which the difference of a span is shared out evenly over its tokens. Tokens of no span,
    and of those with a masked token, are masked. Their `teacher_logprobs` are the student's.

    Args:
        trajectories: with `mask`, `student_logprobs`, `spans` and `span_teacher_logprobs`.
    """
    for trajectory in trajectories:
        annotations = trajectory.annotations
        student, numbers = annotations["student_logprobs"], annotations["spans"]
        taught = annotations["span_teacher_logprobs"]
        inside = numbers >= 0
        places = numbers[inside]
        sums, sizes, unmasked = np.zeros(len(numbers)), np.ones(len(numbers)), inside.copy()
        sums[inside] = np.bincount(places, student[inside])[places]
        sizes[inside] = np.bincount(places)[places]
        unmasked[inside] = np.bincount(places, ~annotations["mask"][inside])[places] == 0
        share = np.where(inside, (taught - sums) / sizes, 0)
        annotations |= {
            "mask": unmasked,
            "span_student_logprobs": sums.astype(student.dtype),
            "teacher_logprobs": (student + share).astype(student.dtype),
        }


def add_rewards(trajectories: Sequence[Trajectory], reward) -> None:
    """Add the rewards of spans to `advantages` [T].

    Args:
        trajectories: after `score_spans`.
        reward: a token reward (rewards/token.py).
    """
    for trajectory in trajectories:
        annotations = trajectory.annotations
        values = reward(*action_logprobs(reward, annotations)).numpy()
        rewards = np.where(annotations["mask"], values, 0).astype(values.dtype)
        annotations["advantages"] = rewards + annotations.get("advantages", 0)


def action_logprobs(
    reward, annotations: Mapping[str, np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's and the student's log-probs [T] of each token's action: itself, or its span.

    Args:
        reward: that reads them.
    """
    if "spans" in annotations:
        names = "span_teacher_logprobs", "span_student_logprobs"
        teacher, student = (annotations[name] for name in names)
    else:
        teacher, student = judged(reward, annotations), annotations["student_logprobs"]
    return torch.from_numpy(teacher), torch.from_numpy(student)


def span_metrics(trajectory: Trajectory) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The share of tokens in spans that the teacher scored, and the tokens of a span.

    Args:
        trajectory: with `spans`.

    Returns:
        metric name -> (values [T], which tokens count [T] bool).
    """
    numbers, sampled = trajectory.annotations["spans"], trajectory.sampled_mask
    inside = (numbers >= 0) & sampled
    first = inside & np.append(True, numbers[1:] != numbers[:-1])
    sizes = np.zeros(len(numbers))
    sizes[first] = np.unique(numbers[inside], return_counts=True)[1]
    return {
        "teacher/aligned_frac": (inside.astype(np.float32), sampled),
        "teacher/span_tokens": (sizes, first),
    }
