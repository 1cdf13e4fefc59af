"""Token rewards from the teacher's and the student's log-prob of the sampled token."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.checks import Shapes, check_choice, check_number
from kernels.rows import acc_dtype

NORMALIZATIONS = ("box_cox", "none")


def box_cox_gap(distance: Tensor, alpha: float) -> Tensor:
    """(1 - e^(-alpha x)) / alpha for x >= 0, at most 1/alpha; its limit x at alpha = 0."""
    return distance if alpha == 0 else torch.expm1(distance * -alpha).neg_().div_(alpha)


def check_power(alpha: float, normalization: str) -> None:
    check_choice("normalization", normalization, NORMALIZATIONS)
    check_number("alpha", alpha, strict=False)
    if alpha == 0 and normalization == "none":
        raise ValueError("alpha must be above 0 with normalization='none' (p^0 - q^0 is 0 everywhere), got 0")


def check_log_ratio(clip: float | None, tanh_scale: float | None) -> None:
    check_number("clip", clip, optional=True)
    check_number("tanh_scale", tanh_scale, optional=True)
    if clip is not None and tanh_scale is not None:
        raise ValueError(f"clip and tanh_scale exclude each other, got {clip} and {tanh_scale}")


def _aligned(teacher_logprobs: Tensor, student_logprobs: Tensor,
             mask: Tensor | None) -> tuple[Tensor, Tensor]:
    shapes = Shapes()
    shapes.check("teacher_logprobs", teacher_logprobs, "T")
    shapes.check("student_logprobs", student_logprobs, "T")
    shapes.check("mask", mask, "T", "bool or uint8", optional=True)
    dtype = acc_dtype(teacher_logprobs, student_logprobs)
    # A rounded log-prob may be slightly above 0.
    return teacher_logprobs.to(dtype).clamp_max(0), student_logprobs.to(dtype).clamp_max(0)


def _gap(lp: Tensor, lq: Tensor) -> Tensor:
    """lp - lq, and 0 where both are -inf: two models that agree on an impossible token."""
    return (lp - lq).masked_fill((lp == -torch.inf) & (lq == -torch.inf), 0)


def _masked(reward: Tensor, mask: Tensor | None) -> Tensor:
    return reward if mask is None else reward.masked_fill(mask == 0, 0)


@torch.no_grad()
def power_reward(teacher_logprobs: Tensor, student_logprobs: Tensor, alpha: float, *,
                 normalization: str = "box_cox", mask: Tensor | None = None) -> Tensor:
    """The PowerOPD reward p^alpha - q^alpha of the sampled tokens (arXiv 2606.17199 eq. 4), without gradient.

    normalization="none" is the paper's form, within [-1, 1]. "box_cox" keeps the Box-Cox factor 1/alpha that
    the paper absorbs into the learning rate: within [-1/alpha, 1/alpha], and alpha -> 0 is the log-ratio
    (alpha == 0 is accepted and is that limit, which is unbounded).

    teacher_logprobs, student_logprobs: [T] floating, nats, clamped to at most 0; -inf allowed (both: 0).
    mask: [T] bool or uint8; masked tokens get 0 and may hold anything.
    Returns [T] float32 (float64 where an input is), positive iff the teacher likes the token more. The
    computation is anchored at the larger probability: it never flips the sign and underflows to 0.

    Raises TypeError or ValueError: shapes, dtypes, negative or non-finite alpha, alpha == 0 with "none".
    """
    check_power(alpha, normalization)
    lp, lq = _aligned(teacher_logprobs, student_logprobs, mask)
    d = _gap(lp, lq)
    reward = d
    if alpha != 0:
        reward = d.sign() * torch.exp(alpha * torch.maximum(lp, lq)) * box_cox_gap(d.abs(), alpha)
        if normalization == "none":
            reward = reward * alpha
    return _masked(reward, mask)


@torch.no_grad()
def log_ratio_reward(teacher_logprobs: Tensor, student_logprobs: Tensor, *, clip: float | None = None,
                     tanh_scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """The plain on-policy distillation reward log p - log q of the sampled tokens, without gradient.

    clip=c bounds it to [-c, c]; tanh_scale=s gives tanh((log p - log q) / s), within [-1, 1] (both as in the
    baselines of arXiv 2606.17199). Arguments, result and errors as in `power_reward`; clip and tanh_scale
    exclude each other. Without a bound the reward of a token that the teacher excludes is -inf.
    """
    check_log_ratio(clip, tanh_scale)
    reward = _gap(*_aligned(teacher_logprobs, student_logprobs, mask))
    if clip is not None:
        reward = reward.clamp(-clip, clip)
    elif tanh_scale is not None:
        reward = torch.tanh(reward / tanh_scale)
    return _masked(reward, mask)


def make_reward(reward: str | None, alpha: float, normalization: str, clip: float | None,
                tanh_scale: float | None) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The reward of that name as a function of (teacher_logprobs, student_logprobs); None for no reward."""
    check_choice("reward", reward, ("power", "log_ratio", None))
    if reward != "log_ratio" and not (clip is None and tanh_scale is None):
        raise ValueError(f"clip and tanh_scale belong to reward='log_ratio', got reward={reward!r}")
    if reward == "power":
        check_power(alpha, normalization)
        return lambda lp, lq: power_reward(lp, lq, alpha, normalization=normalization)
    if reward == "log_ratio":
        check_log_ratio(clip, tanh_scale)
        return lambda lp, lq: log_ratio_reward(lp, lq, clip=clip, tanh_scale=tanh_scale)
    return None
