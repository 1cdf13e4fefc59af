"""Token rewards of on-policy distillation: how much more the teacher likes a sampled token.

A reward is a class with a line in `recipes.components.TOKEN_REWARDS`, under the name by which
`reward.token` selects it. It is constructed with the config's section `reward`. A call maps the
teacher's and the student's log-probs [T] (nats) of the sampled tokens to rewards [T], detached. The
formulas are in kernels/rewards.py.

`fused` holds the keyword arguments with which `kernels.fused_linear_opd_loss` computes the same
inside the head's kernel. A reward without it (None) costs one more matrix product per step.
`window` says that a token's reward depends on all tokens of the step. The student is then scored
once before the update.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import kernels


class Power:
    """p^alpha - q^alpha, in [-1, 1] (PowerOPD, arXiv 2606.17199, eq. 4).

    `normalization=box_cox` divides it by alpha. The Box-Cox map applies to each probability, not to
    their ratio.
    """

    window = False

    def __init__(self, config):
        self.fused = {
            "reward": "power",
            "alpha": config.alpha,
            "normalization": config.normalization,
        }

    def __call__(
        self, teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor
    ) -> torch.Tensor:
        return kernels.power_reward(
            teacher_logprobs,
            student_logprobs,
            self.fused["alpha"],
            normalization=self.fused["normalization"],
        )


class LogRatio:
    """log p - log q, unbounded: vanilla distillation, the policy gradient of the reverse KL."""

    window = False

    def __init__(self, config):
        self.fused = {"reward": "log_ratio"}

    def __call__(
        self, teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor
    ) -> torch.Tensor:
        bounds = {name: value for name, value in self.fused.items() if name != "reward"}
        return kernels.log_ratio_reward(teacher_logprobs, student_logprobs, **bounds)


class Clip(LogRatio):
    """The log-ratio clipped to [-`reward.clip`, `reward.clip`] nats."""

    def __init__(self, config):
        self.fused = {"reward": "log_ratio", "clip": config.clip}


class Tanh(LogRatio):
    """tanh(log-ratio / `reward.tanh_scale`)."""

    def __init__(self, config):
        self.fused = {"reward": "log_ratio", "tanh_scale": config.tanh_scale}


class ZScore(LogRatio):
    """The log-ratio, which trainers/opd.py standardises: (r - mean) / std. It can flip a sign.

    Mean and standard deviation are of the step's unmasked tokens on all ranks.
    """

    window = True

    def __init__(self, config):
        self.fused = None

    def __call__(
        self, teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor
    ) -> torch.Tensor:
        return kernels.log_ratio_reward(teacher_logprobs, student_logprobs)


class Sign(LogRatio):
    """`reward.sign_scale` times the sign of log p - log q (TV-OPD, arXiv 2609.08341).

    It is the direction in which the total variation between both distributions falls.
    """

    def __init__(self, config):
        self.fused = None
        self.scale = config.sign_scale

    def __call__(
        self, teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor
    ) -> torch.Tensor:
        above, below = teacher_logprobs > student_logprobs, teacher_logprobs < student_logprobs
        # The difference of two log-probs of -inf would be NaN.
        return self.scale * (above.to(student_logprobs.dtype) - below.to(student_logprobs.dtype))


class Averaged:
    """The mean of a token reward over several teachers.

    Args:
        reward: a token reward.
        weights: [K], of the teachers, whose sum is 1.
    """

    fused = None
    # The annotation with the teachers' log-probs.
    reads = "each_teacher_logprobs"

    def __init__(self, reward, weights: Sequence[float]):
        self.reward, self.weights = reward, weights
        self.window = reward.window

    def __call__(
        self, teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor
    ) -> torch.Tensor:
        """The rewards [T] for the teachers' log-probs [T, K]."""
        rewards = torch.zeros_like(student_logprobs)
        for weight, logprobs in zip(self.weights, teacher_logprobs.unbind(1), strict=True):
            rewards = rewards + weight * self.reward(logprobs.contiguous(), student_logprobs)
        return rewards


class Weighted:
    """A token reward times a number."""

    fused = None

    def __init__(self, reward, weight: float):
        self.reward, self.weight = reward, weight
        self.window = reward.window

    def __call__(
        self, teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor
    ) -> torch.Tensor:
        return self.weight * self.reward(teacher_logprobs, student_logprobs)
