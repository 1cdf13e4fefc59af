"""The Triton kernel from log-probs to token rewards and policy-gradient terms: one launch,
elementwise, with sums.

The specification is kernels/rewards.py and kernels/policy_loss.py. Sums are made per program and
then over the programs, in float64 and in a fixed order. So the same tokens give the same loss, run
after run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_math import OBJECTIVES, REWARDS, policy_terms, token_reward
from kernels.triton_rows import scalar

_BLOCK = 512
_SUMS = 7


class TokenOutput(NamedTuple):
    """rewards, slope (factors included) [n], 0 where masked; sums [7] float64 as in
    `_tokens_kernel`."""

    rewards: Tensor | None
    slope: Tensor | None
    sums: Tensor | None


@triton.jit
def _load(ptr, t, live, ACC: tl.constexpr):
    """The live tokens' values; 0 elsewhere, whatever memory holds."""
    return tl.load(ptr + t, mask=live, other=0.0).to(ACC)


@triton.jit
def _sum(values, live):
    """Over the live tokens, in float64."""
    return tl.sum(tl.where(live, values, 0.0).to(tl.float64), 0)


@triton.jit
def _count(flags, live):
    return tl.sum((flags & live).to(tl.float64), 0)


@triton.jit
def _store_sums(sums_ptr, loss, factor, log_ratio, low, high, capped, live):
    """The seven sums of `_tokens_kernel`."""
    weighted = tl.where(live, loss.to(tl.float64) * factor.to(tl.float64), 0.0)
    tl.store(sums_ptr, tl.sum(weighted, 0))
    tl.store(sums_ptr + 1, _sum(tl.exp(log_ratio), live))
    k3 = tl.exp(log_ratio) - 1.0 - log_ratio
    tl.store(sums_ptr + 2, _sum(k3, live))
    tl.store(sums_ptr + 3, _count(low, live))
    tl.store(sums_ptr + 4, _count(high, live))
    tl.store(sums_ptr + 5, _count(capped, live))
    tl.store(sums_ptr + 6, tl.sum(live.to(tl.float64), 0))


@triton.jit(do_not_specialize=["n"])
def _tokens_kernel(
    n,
    logprobs_ptr,
    teacher_ptr,
    advantages_ptr,
    factors_ptr,
    old_ptr,
    rollout_ptr,
    mask_ptr,
    alpha: tl.float64,
    scale: tl.float64,
    bound: tl.float64,
    clip_low: tl.float64,
    clip_high: tl.float64,
    dual_clip: tl.float64,
    is_cap: tl.float64,
    rewards_ptr,
    slope_ptr,
    sums_ptr,
    REWARD: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    HAS_ADVANTAGES: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DUAL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rewards, slopes, and per program: weighted loss, ratio, k3, clips low and high, caps, tokens.

    k3 is e^r - 1 - r of the log-ratio r.
    """
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = t < n
    if HAS_MASK:
        live = live & (tl.load(mask_ptr + t, mask=live, other=0) != 0)
    logprob = _load(logprobs_ptr, t, live, ACC)
    advantage = logprob * 0.0
    if REWARD != 0:
        teacher = _load(teacher_ptr, t, live, ACC)
        advantage = token_reward(
            teacher, logprob, scalar(alpha, ACC), scalar(scale, ACC), scalar(bound, ACC), REWARD
        )
        tl.store(rewards_ptr + t, tl.where(live, advantage, 0.0), mask=t < n)
    if OBJECTIVE != 0:
        if HAS_ADVANTAGES:
            advantage += _load(advantages_ptr, t, live, ACC)
        factor = advantage * 0.0 + 1.0
        if HAS_FACTORS:
            factor = _load(factors_ptr, t, live, ACC)
        old = logprob
        if HAS_OLD:
            old = _load(old_ptr, t, live, ACC)
        rollout = logprob
        if HAS_ROLLOUT:
            rollout = _load(rollout_ptr, t, live, ACC)
        loss, slope, log_ratio, low, high, capped = policy_terms(
            logprob,
            advantage,
            old,
            rollout,
            scalar(clip_low, ACC),
            scalar(clip_high, ACC),
            scalar(dual_clip, ACC),
            scalar(is_cap, ACC),
            OBJECTIVE,
            HAS_OLD,
            HAS_ROLLOUT,
            DUAL,
        )
        tl.store(slope_ptr + t, tl.where(live, slope * factor, 0.0), mask=t < n)
        sums_ptr += tl.program_id(0) * 7
        _store_sums(sums_ptr, loss, factor, log_ratio, low, high, capped, live)


def tokens(
    logprobs: Tensor,
    dtype: torch.dtype,
    *,
    teacher: Tensor | None = None,
    reward: str | None = None,
    alpha: float = 0.0,
    scale: float = 1.0,
    bound: float = 1.0,
    advantages: Tensor | None = None,
    factors: Tensor | None = None,
    old: Tensor | None = None,
    rollout: Tensor | None = None,
    mask: Tensor | None = None,
    objective: str | None = None,
    clip_low: float = 0.0,
    clip_high: float = 0.0,
    dual_clip: float | None = None,
    is_cap: float | None = None,
) -> TokenOutput:
    """The reward, the policy-gradient terms, or both, of n tokens.

    All tensors are [n]; results are in `dtype`.

    Args:
        reward: a key of triton_math.REWARDS, with its alpha, factor (scale) and bound.
        mask: bool or uint8. Masked tokens give 0 and may hold anything.
        objective: a key of triton_math.OBJECTIVES, with its bounds.
    """
    n, device = len(logprobs), logprobs.device
    programs = triton.cdiv(n, _BLOCK)
    rewards = slope = sums = None
    if reward is not None:
        rewards = torch.empty(n, dtype=dtype, device=device)
    if objective is not None:
        slope = torch.empty(n, dtype=dtype, device=device)
        sums = torch.empty(programs, _SUMS, dtype=torch.float64, device=device)
    given = (logprobs, teacher, advantages, factors, old, rollout, mask)
    given = [None if x is None else x.detach().contiguous() for x in given]
    if n:
        with torch.cuda.device_of(logprobs):
            _tokens_kernel[(programs,)](
                n,
                *given,
                alpha,
                scale,
                bound,
                clip_low,
                clip_high,
                0.0 if dual_clip is None else dual_clip,
                float("inf") if is_cap is None else is_cap,
                rewards,
                slope,
                sums,
                REWARD=REWARDS[reward],
                OBJECTIVE=OBJECTIVES[objective],
                HAS_ADVANTAGES=advantages is not None,
                HAS_FACTORS=factors is not None,
                HAS_OLD=old is not None,
                HAS_ROLLOUT=rollout is not None,
                HAS_MASK=mask is not None,
                DUAL=dual_clip is not None,
                BLOCK=_BLOCK,
                num_warps=4,
                ACC=tl.float64 if dtype == torch.float64 else tl.float32,
            )
    return TokenOutput(rewards, slope, None if sums is None else sums.sum(0))
