"""Token rewards of on-policy distillation: how much the teacher likes a sampled token, given both
log-probs.

A reward is a class registered under the name that `reward.token` selects. Calling it with the
teacher's and the student's log-probs [T] (nats) of the sampled tokens gives the rewards [T],
detached. `fused` names what `kernels.fused_linear_opd_loss` needs to compute the same inside the
head's kernel; a reward without it (None) costs one more matrix product per step. `window` says that
a token's reward depends on all tokens of the step, so the student must be scored once before the
update."""

from __future__ import annotations

import torch

import kernels


class Power:
    """p^alpha - q^alpha (PowerOPD, arXiv 2606.17199, eq. 4), over alpha with
    `normalization=box_cox`. In [-1, 1] without it. The two Box-Cox terms apply to each probability,
    not to the ratio."""

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
    """log p - log q: vanilla on-policy distillation, the policy gradient of the reverse KL.
    Unbounded."""

    window = False

    def __init__(self, config):
        self.fused = {"reward": "log_ratio"}

    def __call__(
        self, teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor
    ) -> torch.Tensor:
        shape = {
            name: value for name, value in self.fused.items() if name in ("clip", "tanh_scale")
        }
        return kernels.log_ratio_reward(teacher_logprobs, student_logprobs, **shape)


class Clip(LogRatio):
    """The log-ratio clipped to +-`reward.clip` nats."""

    def __init__(self, config):
        self.fused = {"reward": "log_ratio", "clip": config.clip}


class Tanh(LogRatio):
    """tanh(log-ratio / `reward.tanh_scale`)."""

    def __init__(self, config):
        self.fused = {"reward": "log_ratio", "tanh_scale": config.tanh_scale}


class ZScore(LogRatio):
    """The log-ratio, standardised by the loop over the unmasked tokens of the step, all ranks: (r -
    mean)/std. It can flip a reward's sign."""

    window = True

    def __init__(self, config):
        self.fused = None

    def __call__(
        self, teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor
    ) -> torch.Tensor:
        return kernels.log_ratio_reward(teacher_logprobs, student_logprobs)
