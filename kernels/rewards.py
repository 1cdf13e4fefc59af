"""Token rewards from the teacher's and the student's log-prob of the sampled token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import use_triton
from kernels.checks import Shapes, check_choice, check_number
from kernels.library import traceable
from kernels.rows import acc_dtype
from kernels.traced import Field

NORMALIZATIONS = ("box_cox", "none")


def box_cox_gap(distance: Tensor, alpha: float) -> Tensor:
    """(1 - e^(-alpha x)) / alpha for x >= 0, at most 1/alpha; its limit x at alpha = 0."""
    return distance if alpha == 0 else torch.expm1(distance * -alpha).neg_().div_(alpha)


@dataclass(frozen=True)
class TokenReward:
    """A reward of (teacher_logprobs, student_logprobs) and its parameters.

    `terms` is the mathematics.

    Raises:
        TypeError, ValueError: a parameter out of its range, or one that belongs to another reward.
    """

    name: str
    alpha: float = 1.0
    normalization: str = "box_cox"
    clip: float | None = None
    tanh_scale: float | None = None

    def __post_init__(self) -> None:
        check_choice("reward", self.name, ("power", "log_ratio"))
        if self.name == "power":
            check_power(self.alpha, self.normalization)
        check_number("clip", self.clip, optional=True)
        check_number("tanh_scale", self.tanh_scale, optional=True)
        if self.clip is not None and self.tanh_scale is not None:
            raise ValueError(
                f"clip and tanh_scale exclude each other, got {self.clip} and {self.tanh_scale}"
            )

    def terms(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Rewards [n] of log-probs [n] in one dtype."""
        # A rounded log-prob may be slightly above 0.
        teacher, student = teacher.clamp_max(0), student.clamp_max(0)
        # Two models that agree on an impossible token: 0, where -inf - -inf is NaN.
        both_gone = (teacher == -torch.inf) & (student == -torch.inf)
        gap = (teacher - student).masked_fill(both_gone, 0)
        if self.name == "power" and self.alpha != 0:
            # Anchored at the larger probability, so that neither sign nor digits are lost.
            anchor = torch.exp(self.alpha * torch.maximum(teacher, student))
            reward = gap.sign() * anchor * box_cox_gap(gap.abs(), self.alpha)
            return reward * self.alpha if self.normalization == "none" else reward
        if self.clip is not None:
            return gap.clamp(-self.clip, self.clip)
        return gap if self.tanh_scale is None else torch.tanh(gap / self.tanh_scale)

    def for_triton(self) -> dict:
        """The same as keyword arguments of `triton_tokens.tokens`."""
        if self.name == "power" and self.alpha != 0:
            scale = self.alpha if self.normalization == "none" else 1.0
            return {"reward": "power", "alpha": self.alpha, "scale": scale}
        if self.clip is not None:
            return {"reward": "clip", "bound": self.clip}
        if self.tanh_scale is not None:
            return {"reward": "tanh", "bound": self.tanh_scale}
        return {"reward": "log_ratio"}


def check_power(alpha: float, normalization: str) -> None:
    check_choice("normalization", normalization, NORMALIZATIONS)
    check_number("alpha", alpha, strict=False)
    if alpha == 0 and normalization == "none":
        raise ValueError(
            "alpha must be above 0 with normalization='none' (p^0 - q^0 is 0 everywhere), got 0"
        )


def _rewards(
    rule: TokenReward, teacher_logprobs: Tensor, student_logprobs: Tensor, mask: Tensor | None
) -> Tensor:
    shapes = Shapes()
    shapes.check("teacher_logprobs", teacher_logprobs, "T")
    shapes.check("student_logprobs", student_logprobs, "T")
    shapes.check("mask", mask, "T", "bool or uint8", optional=True)
    dtype = acc_dtype(teacher_logprobs, student_logprobs)
    if use_triton(student_logprobs):
        from kernels import triton_tokens

        return triton_tokens.tokens(
            student_logprobs, dtype, teacher=teacher_logprobs, mask=mask, **rule.for_triton()
        ).rewards
    reward = rule.terms(teacher_logprobs.to(dtype), student_logprobs.to(dtype))
    return reward if mask is None else reward.masked_fill(mask == 0, 0)


@traceable({"reward": Field("teacher_logprobs")}, acc=["teacher_logprobs", "student_logprobs"])
@torch.no_grad()
def power_reward(
    teacher_logprobs: Tensor,
    student_logprobs: Tensor,
    alpha: float,
    *,
    normalization: str = "box_cox",
    mask: Tensor | None = None,
) -> Tensor:
    """The PowerOPD reward p^alpha - q^alpha of the sampled tokens (arXiv 2606.17199 eq. 4), without
    gradient.

    The computation is anchored at the larger probability: it never flips the sign, and it
    underflows to 0.

    Args:
        teacher_logprobs, student_logprobs: [T] floating, nats, clamped to at most 0. -inf is
            allowed; where both are, the reward is 0.
        alpha: at least 0. 0 is the limit of "box_cox": the log-ratio, which is unbounded.
        normalization: "none" is the paper's form, within [-1, 1]. "box_cox" keeps the Box-Cox
            factor 1/alpha that the paper absorbs into the learning rate: within [-1/alpha,
            1/alpha].
        mask: [T] bool or uint8. Masked tokens get 0 and may hold anything.

    Returns:
        [T] float32 (float64 where an input is), positive iff the teacher likes the token more.

    Raises:
        TypeError, ValueError: shapes, dtypes, a negative or non-finite alpha, alpha == 0 with
            "none".
    """
    return _rewards(
        TokenReward("power", alpha, normalization), teacher_logprobs, student_logprobs, mask
    )


@traceable({"reward": Field("teacher_logprobs")}, acc=["teacher_logprobs", "student_logprobs"])
@torch.no_grad()
def log_ratio_reward(
    teacher_logprobs: Tensor,
    student_logprobs: Tensor,
    *,
    clip: float | None = None,
    tanh_scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The plain on-policy distillation reward log p - log q of the sampled tokens, without
    gradient.

    Without a bound the reward of a token that the teacher excludes is -inf. The bounds exclude each
    other; both are as in the baselines of arXiv 2606.17199.

    Args:
        clip: c bounds the reward to [-c, c].
        tanh_scale: s gives tanh((log p - log q) / s), within [-1, 1].

    The other arguments, the result and the errors are those of `power_reward`.
    """
    return _rewards(
        TokenReward("log_ratio", clip=clip, tanh_scale=tanh_scale),
        teacher_logprobs,
        student_logprobs,
        mask,
    )
