"""The policy-gradient loss of sampled tokens: one definition, for log-probs and for the fused LM
head."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import use_triton
from kernels.checks import Shapes, check_choice, check_denominator, check_number
from kernels.library import traceable
from kernels.rewards import TokenReward
from kernels.rows import acc_dtype
from kernels.traced import Field

OBJECTIVES = ("reinforce", "ppo_clip", "cispo")
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum")
# Bounds log-ratios so that exp stays finite; a ratio of e^20 is broken data, not signal.
MAX_LOG_RATIO = 20.0


class PGOutput(NamedTuple):
    """loss: differentiable scalar; stats: detached scalars over this call's unmasked tokens."""

    loss: Tensor
    stats: dict[str, Tensor]


class TokenTerms(NamedTuple):
    """Per token, [n]: its loss, what the loss does with the log-prob, and which bounds act.

    slope: the loss's derivative by the log-prob. log_ratio: to the old policy.
    """

    loss: Tensor
    slope: Tensor
    log_ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    capped: Tensor


@dataclass(frozen=True)
class PolicyObjective:
    """A token objective and its bounds; `terms` is the mathematics of all of them."""

    name: str = "reinforce"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    is_cap: float | None = None

    def __post_init__(self) -> None:
        check_choice("objective", self.name, OBJECTIVES)
        check_number("clip_low", self.clip_low, high=1.0, strict=False)
        check_number("clip_high", self.clip_high, strict=False)
        check_number("dual_clip", self.dual_clip, low=1.0, optional=True)
        if self.is_cap != math.inf:
            check_number("is_cap", self.is_cap, optional=True)
        if self.dual_clip is not None and self.name != "ppo_clip":
            raise ValueError(
                f"dual_clip belongs to objective='ppo_clip', got objective={self.name!r}"
            )

    def check_inputs(self, rollout_logprobs: Tensor | None) -> None:
        if (rollout_logprobs is None) != (self.is_cap is None):
            given = "no" if rollout_logprobs is None else "a tensor of"
            raise ValueError(
                "rollout_logprobs and is_cap must be given together (is_cap=math.inf: no cap), "
                f"got {given} rollout_logprobs and is_cap={self.is_cap}"
            )

    def terms(
        self,
        logprobs: Tensor,
        advantages: Tensor,
        old_logprobs: Tensor | None,
        rollout_logprobs: Tensor | None,
    ) -> TokenTerms:
        """All inputs [n], detached.

        Without old log-probs the policy is its own old one, and the ratio is 1.
        """
        if old_logprobs is None:
            log_ratio = torch.zeros_like(logprobs)
        else:
            log_ratio = _bounded(logprobs - old_logprobs)
        if self.name == "ppo_clip":
            loss, slope, low, high = self._ppo_terms(log_ratio, advantages)
        else:
            loss, slope, low, high = self._score_terms(log_ratio, logprobs, advantages)
        if rollout_logprobs is None:
            capped = torch.zeros_like(low)
        else:
            # Trainer against sampler: truncated importance sampling.
            trainer = logprobs if old_logprobs is None else old_logprobs
            weight = _bounded(trainer - rollout_logprobs).exp()
            capped = weight > self.is_cap
            weight = weight.clamp_max(self.is_cap)
            loss, slope = loss * weight, slope * weight
        return TokenTerms(loss, slope, log_ratio, low, high, capped)

    def _ppo_terms(self, log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, ...]:
        """(loss, slope, clipped low, clipped high) of PPO's clipped ratio, [n]."""
        ratio = log_ratio.exp()
        bounded = self._clip(ratio)
        low = (advantages < 0) & (ratio < bounded)
        high = (advantages > 0) & (ratio > bounded)
        gain = torch.minimum(ratio * advantages, bounded * advantages)
        flat = low | high
        if self.dual_clip is not None:
            floor = self.dual_clip * advantages
            beyond = (advantages < 0) & (gain < floor)
            gain = torch.where(beyond, floor, gain)
            flat, high = flat | beyond, high | beyond
        flat = flat | (log_ratio.abs() >= MAX_LOG_RATIO)
        slope = (ratio * -advantages).masked_fill(flat, 0)
        return -gain, slope, low, high

    def _score_terms(
        self, log_ratio: Tensor, logprobs: Tensor, advantages: Tensor
    ) -> tuple[Tensor, ...]:
        """The same of -A logprob, which CISPO weighs by the clipped ratio."""
        slope = -advantages
        low = high = torch.zeros_like(logprobs, dtype=torch.bool)
        if self.name == "cispo":
            ratio = log_ratio.exp()
            bounded = self._clip(ratio)
            low, high = ratio < bounded, ratio > bounded
            slope = slope * bounded
        # 0 * log 0 is 0.
        loss = (slope * logprobs).masked_fill(slope == 0, 0)
        return loss, slope, low, high

    def _clip(self, ratio: Tensor) -> Tensor:
        return ratio.clamp(1 - self.clip_low, 1 + self.clip_high)


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def weighted_sum(values: Tensor, factors: Tensor) -> Tensor:
    """sum(values * factors) of [n] tensors, in a fixed order and in float64.

    It is the same for the same tokens, run after run.
    """
    return (values.double() * factors.double()).sum().to(values.dtype)


def loss_factors(
    active: Tensor,
    weights: Tensor | None,
    denominator: float | Tensor,
    dtype: torch.dtype,
    loss_scale: float | Tensor = 1.0,
) -> Tensor:
    """weight * loss_scale / denominator of the active tokens, [n]; weights are [T]."""
    factors = torch.ones(len(active), dtype=dtype, device=active.device)
    if weights is not None:
        factors = weights.detach().index_select(0, active).to(dtype)
    return factors * loss_scale / denominator


class TokenInputs(NamedTuple):
    """What the loss of n tokens is made of besides their log-probs, [n] each.

    factors: weight * loss_scale / denominator. teacher, old, rollout: log-probs.
    """

    factors: Tensor
    advantages: Tensor | None = None
    old: Tensor | None = None
    rollout: Tensor | None = None
    teacher: Tensor | None = None

    def part(self, at: slice) -> "TokenInputs":
        return TokenInputs(*(None if x is None else x[at] for x in self))


class TokenLoss(NamedTuple):
    """rewards [n] (None without one); slope [n]: d loss / d logprob; loss: scalar; stats: detached
    scalars."""

    rewards: Tensor | None
    slope: Tensor
    loss: Tensor
    stats: dict[str, Tensor]


STATS = ("ratio_mean", "approx_kl", "clip_frac_low", "clip_frac_high", "is_cap_frac")


def token_loss(
    rule: PolicyObjective,
    reward: TokenReward | None,
    logprobs: Tensor,
    given: TokenInputs,
    mask: Tensor | None = None,
) -> TokenLoss:
    """sum_t factors_t objective_t with the advantage reward + advantages, and its derivatives.

    logprobs and mask are [n]. The stats are means over the unmasked tokens (0 if there are none).
    Masked tokens may hold NaN.
    """
    compute = _triton_token_loss if use_triton(logprobs) else _torch_token_loss
    return compute(rule, reward, logprobs, given, mask)


def _triton_token_loss(
    rule: PolicyObjective,
    reward: TokenReward | None,
    logprobs: Tensor,
    given: TokenInputs,
    mask: Tensor | None,
) -> TokenLoss:
    from kernels import triton_tokens

    dtype = acc_dtype(logprobs)
    out = triton_tokens.tokens(
        logprobs,
        dtype,
        **given._asdict(),
        mask=mask,
        objective=rule.name,
        clip_low=rule.clip_low,
        clip_high=rule.clip_high,
        dual_clip=rule.dual_clip,
        is_cap=rule.is_cap,
        **({} if reward is None else reward.for_triton()),
    )
    loss, count = out.sums[0].to(dtype), out.sums[6].clamp_min(1)
    means = (out.sums[1:6] / count).to(dtype)
    return TokenLoss(out.rewards, out.slope, loss, dict(zip(STATS, means)))


def _torch_token_loss(
    rule: PolicyObjective,
    reward: TokenReward | None,
    logprobs: Tensor,
    given: TokenInputs,
    mask: Tensor | None,
) -> TokenLoss:
    dtype = acc_dtype(logprobs)
    live = None if mask is None else mask != 0

    def clean(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x.detach().to(dtype)
        return x if live is None else torch.where(live, x, 0)

    logprobs = clean(logprobs)
    factors, advantages, old, rollout, teacher = (clean(x) for x in given)
    rewards = None
    if reward is not None:
        rewards = clean(reward.terms(teacher, logprobs))
        advantages = rewards if advantages is None else rewards + advantages
    terms = rule.terms(logprobs, advantages, old, rollout)
    loss = weighted_sum(terms.loss, factors)
    return TokenLoss(rewards, terms.slope * factors, loss, _stats(terms, live, dtype))


def _stats(terms: TokenTerms, live: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Means over the live tokens, by name."""
    n = max(len(terms.loss), 1) if live is None else live.sum().clamp_min(1)
    ratio = terms.log_ratio.exp()
    # Schulman's low-variance estimate of KL(old || new)
    k3 = torch.expm1(terms.log_ratio) - terms.log_ratio
    per_token = (ratio, k3, terms.clipped_low, terms.clipped_high, terms.capped)
    return {
        name: (x if live is None else x * live).sum().to(dtype) / n
        for name, x in zip(STATS, per_token)
    }


def _sequence_weights(seq_ids: Tensor, mask: Tensor | None) -> Tensor:
    """1 / (number of unmasked tokens of the token's sequence), [T]; 0 at masked tokens."""
    live = torch.ones_like(seq_ids) if mask is None else (mask != 0).long()
    # Masked ids may be anything.
    ids = seq_ids * live
    return live / torch.bincount(ids, weights=live).clamp_min(1)[ids]


class _TokenLoss(torch.autograd.Function):
    """A loss whose gradient by the log-probs was made together with its value."""

    @staticmethod
    def forward(ctx, logprobs: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.dtype = logprobs.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        return (ctx.saved_tensors[0] * upstream).to(ctx.dtype), None, None


@traceable(
    {"loss": Field(), "stats": Field(keys=STATS)}, acc=["logprobs"], by=["logprobs"], of=["loss"]
)
def policy_gradient_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    denominator: float | Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    objective: str = "reinforce",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    is_cap: float | None = None,
    seq_ids: Tensor | None = None,
    aggregation: str = "token_mean",
) -> PGOutput:
    """Policy-gradient loss from per-token log-probs.

    With ratio = exp(logprobs - old_logprobs) and A the advantage, the loss of a token is
      reinforce  -A logprob
      ppo_clip   -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) (arXiv 1707.06347); where
                 A < 0 at most -dual_clip A (arXiv 1912.09729)
      cispo      -stop_gradient(clip(ratio, 1 - clip_low, 1 + clip_high)) A logprob (arXiv
                 2506.13585)
    times weights, and times the truncated importance weight min(exp(trainer - rollout_logprobs),
    is_cap) where rollout_logprobs are given. The trainer's log-probs are old_logprobs, or logprobs
    without them. Without old_logprobs the ratio is 1.

    The sum is divided by `denominator`, which the caller counts over the whole optimizer step:
      token_mean           the sum over tokens (denominator: tokens)
      seq_mean_token_mean  the sum over sequences of the mean over their unmasked tokens in this
                           call, so a sequence must not be split over calls (denominator: sequences)
      seq_mean_token_sum   the sum over tokens (denominator: sequences)

    Args:
        logprobs: [T] floating, nats, differentiable.
        advantages, weights, old_logprobs, rollout_logprobs: [T] floating, taken as constants.
        denominator: a number or 0-dim tensor, above 0.
        mask: [T] bool or uint8. Masked tokens: loss and gradient exactly 0, may hold NaN.
        objective, clip_low, clip_high, dual_clip: as above.
        is_cap: above 0, or math.inf for no cap; needed with rollout_logprobs.
        seq_ids: [T] int64 >= 0, needed by seq_mean_token_mean.

    Returns:
        The loss and the stats ratio_mean, clip_frac_low, clip_frac_high, approx_kl, is_cap_frac.

    Raises:
        TypeError, ValueError: shapes, dtypes, choices and bounds.
    """
    rule = PolicyObjective(objective, clip_low, clip_high, dual_clip, is_cap)
    rule.check_inputs(rollout_logprobs)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_denominator(denominator)
    shapes = Shapes()
    shapes.check("logprobs", logprobs, "T")
    shapes.check("advantages", advantages, "T")
    shapes.check("weights", weights, "T", optional=True)
    shapes.check("old_logprobs", old_logprobs, "T", optional=True)
    shapes.check("rollout_logprobs", rollout_logprobs, "T", optional=True)
    shapes.check("mask", mask, "T", "bool or uint8", optional=True)
    shapes.check("seq_ids", seq_ids, "T", "int64", optional=True)
    if aggregation == "seq_mean_token_mean" and seq_ids is None:
        raise ValueError("seq_ids must be given with aggregation='seq_mean_token_mean', got None")

    dtype = acc_dtype(logprobs)
    factors = torch.ones_like(logprobs, dtype=dtype) if weights is None else weights.detach()
    if aggregation == "seq_mean_token_mean":
        factors = factors * _sequence_weights(seq_ids, mask)
    factors = factors.to(dtype) / denominator
    given = TokenInputs(factors, advantages, old_logprobs, rollout_logprobs)
    out = token_loss(rule, None, logprobs, given, mask)
    return PGOutput(_TokenLoss.apply(logprobs, out.loss, out.slope), out.stats)
