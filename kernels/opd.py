"""On-policy distillation in one shot: LM head, token reward, policy-gradient loss and their
gradient."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import (
    Shapes,
    check_choice,
    check_denominator,
    check_number,
    check_scale,
    check_vocab,
)
from kernels.library import traceable
from kernels.policy_loss import (
    STATS,
    PolicyObjective,
    TokenInputs,
    TokenLoss,
    loss_factors,
    token_loss,
    weighted_sum,
)
from kernels.rewards import TokenReward
from kernels.rows import LogprobGrad, RowStats, Softmax, acc_dtype, slices
from kernels.tiled_head import (
    HeadGrads,
    HeadInputs,
    TiledHead,
    active_rows,
    needs_grad,
    scaled_grad,
    spread_constants,
    stream_logits,
)
from kernels.traced import Field


class OPDOutput(NamedTuple):
    """loss: differentiable scalar. Detached: [T] tensors in nats, 0 at masked tokens, and scalar
    stats."""

    loss: Tensor
    logprobs: Tensor
    rewards: Tensor
    entropy: Tensor | None
    stats: dict[str, Tensor]


@dataclass(frozen=True)
class _Loss:
    """What turns log-probs into a loss."""

    reward: TokenReward | None
    objective: PolicyObjective
    entropy_coef: float

    def of(self, logprobs: Tensor, given: TokenInputs) -> TokenLoss:
        return token_loss(self.objective, self.reward, logprobs, given)

    def grad(self, final: Softmax, ids: Tensor, given: TokenInputs) -> LogprobGrad:
        """The loss's gradient by the logits of rows [n] with the target ids [n, 1]."""
        slope = self.of(final.logprobs[:, 0], given).slope
        return LogprobGrad(
            final.shift,
            final.total,
            ids,
            slope[:, None],
            g_entropy=-self.entropy_coef * given.factors if self.entropy_coef else None,
            entropy=final.entropy,
        )


class _FusedLinearOPD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        head: TiledHead,
        active,
        ids,
        given: TokenInputs,
        loss: _Loss,
        with_entropy,
        needs,
    ):
        n = len(active)
        grads = HeadGrads(head, hidden, needs)
        logprobs = torch.zeros_like(given.factors)
        entropy = torch.zeros_like(given.factors) if with_entropy else None
        size = head.chunk_rows(workspaces=1)
        kept = head.workspace(min(size, n)) if any(needs) else ()
        for at in slices(n, size):
            rows, columns = active[at], ids[at, None]
            stats = RowStats(len(rows), head.dtype, hidden.device, columns, with_entropy)
            stream_logits(head, hidden, rows, stats, kept)
            final = stats.final()
            logprobs[at] = final.logprobs[:, 0]
            if with_entropy:
                entropy[at] = final.entropy
            if any(needs):
                # The loss of a row depends on that row alone, so its gradient can be made at once.
                grad = loss.grad(final, columns, given.part(at))
                grads.add_rows(head, hidden, rows, grad.by_logits_, kept)

        result = loss.of(logprobs, given)
        rewards = torch.zeros_like(logprobs) if result.rewards is None else result.rewards
        value = result.loss
        if loss.entropy_coef:
            value = value - loss.entropy_coef * weighted_sum(entropy, given.factors)
        outputs = spread_constants(ctx, [logprobs, rewards, entropy], active, len(hidden))
        ctx.save_for_backward(*grads.as_tuple())
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return value, *outputs, result.stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        grads = (scaled_grad(g, upstream, d) for g, d in zip(ctx.saved_tensors, ctx.dtypes))
        return *grads, *[None] * 7


@traceable(
    {
        "loss": Field(),
        "logprobs": Field("token_ids"),
        "rewards": Field("token_ids"),
        "entropy": Field("token_ids", when="return_entropy"),
        "stats": Field(keys=STATS),
    },
    acc=["hidden", "lm_head_weight"],
    by=["hidden", "lm_head_weight", "bias"],
    of=["loss"],
)
def fused_linear_opd_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    teacher_logprobs: Tensor | None = None,
    *,
    denominator: float | Tensor,
    reward: str | None = "power",
    alpha: float = 1.0,
    normalization: str = "box_cox",
    clip: float | None = None,
    tanh_scale: float | None = None,
    advantages: Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    objective: str = "reinforce",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    is_cap: float | None = None,
    entropy_coef: float = 0.0,
    loss_scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    valid_vocab_size: int | None = None,
    return_entropy: bool = False,
) -> OPDOutput:
    """On-policy distillation loss of sampled tokens from hidden states; the forward makes the
    gradient too.

    loss = loss_scale / denominator * sum_t weights_t (objective_t - entropy_coef entropy_t),
    unmasked tokens only. A token's advantage is its reward plus `advantages`, whichever are given.
    The reward compares teacher_logprobs with the student's own log-probs, detached. With
    reward=None and advantages of one the loss is cross-entropy.

    There are 3 GEMMs in all, 2 with a frozen head, and at most a chunk of rows' logits at a time.
    dX and dW are accumulated in float32 (float64 for float64 inputs). The log-probs are bitwise
    those of `fused_linear_logprobs`.

    Args:
        hidden, lm_head_weight, bias: [T, H], [V, H], [V] floating, differentiable.
        token_ids: [T] int64.
        teacher_logprobs: [T] nats, of whatever token the teacher was scored on; needed exactly
            where there is a reward.
        denominator: above 0, a number or 0-dim tensor.
        reward: "power" is `power_reward` (PowerOPD, arXiv 2606.17199 eq. 4) with alpha and
            normalization; "log_ratio" is `log_ratio_reward` with clip or tanh_scale; None is
            advantages only.
        advantages, weights, old_logprobs, rollout_logprobs: [T] floating, constants.
        mask: [T] bool or uint8. Masked tokens: loss and gradient exactly 0. They cost nothing and
            may hold NaN or any id.
        objective, clip_low, clip_high, dual_clip, is_cap: as in `policy_gradient_loss`.
        entropy_coef: of the entropy bonus.
        loss_scale: a number or 0-dim tensor that multiplies the loss.
        temperature, logit_softcap, valid_vocab_size: as in `fused_linear_logprobs`.
        return_entropy: whether to return the entropies.

    Returns:
        The loss, logprobs [T], rewards [T] (without `advantages`), entropy [T] or None, and the
        stats of `policy_gradient_loss`.

    Raises:
        TypeError, ValueError: shapes, dtypes, choices, bounds.
        IndexError: a token id outside the valid vocabulary.
    """
    inputs = HeadInputs(hidden, lm_head_weight, bias, temperature, logit_softcap)
    per_token = {
        "teacher_logprobs": teacher_logprobs,
        "advantages": advantages,
        "weights": weights,
        "old_logprobs": old_logprobs,
        "rollout_logprobs": rollout_logprobs,
    }
    shapes = Shapes()
    inputs.check(shapes, mask)
    for name, value in per_token.items():
        shapes.check(name, value, "T", optional=True)
    vocab = check_vocab(valid_vocab_size, lm_head_weight.shape[0])
    active = active_rows(mask, len(hidden), hidden.device)
    shapes.ids("token_ids", token_ids, "T", active, vocab)
    token_reward = _token_reward(reward, alpha, normalization, clip, tanh_scale)
    _check_sources(reward, teacher_logprobs, advantages)
    rule = PolicyObjective(objective, clip_low, clip_high, dual_clip, is_cap)
    rule.check_inputs(rollout_logprobs)
    check_number("entropy_coef", entropy_coef, low=-float("inf"), strict=False)
    check_denominator(denominator)
    check_scale("loss_scale", loss_scale)

    head = inputs.tiled(vocab, acc_dtype(hidden, lm_head_weight))
    factors = loss_factors(active, weights, denominator, head.dtype, loss_scale)
    constants = (advantages, old_logprobs, rollout_logprobs, teacher_logprobs)
    given = TokenInputs(factors, *(_taken(x, active, head.dtype) for x in constants))
    ids = token_ids.index_select(0, active)
    loss = _Loss(token_reward, rule, entropy_coef)
    return _one_shot(inputs, head, active, ids, given, loss, return_entropy)


def _one_shot(
    inputs: HeadInputs,
    head: TiledHead,
    active: Tensor,
    ids: Tensor,
    given: TokenInputs,
    loss: _Loss,
    return_entropy: bool,
) -> OPDOutput:
    """Checked arguments to the autograd function; ids and `given` are of the active tokens [n]."""
    hidden, weight, bias, *_ = inputs
    with_entropy = return_entropy or loss.entropy_coef != 0
    needs = needs_grad(hidden, weight, bias)
    value, logprobs, rewards, entropy, stats = _FusedLinearOPD.apply(
        hidden, weight, bias, head, active, ids, given, loss, with_entropy, needs
    )
    return OPDOutput(value, logprobs, rewards, entropy if return_entropy else None, stats)


def _token_reward(
    reward: str | None,
    alpha: float,
    normalization: str,
    clip: float | None,
    tanh_scale: float | None,
) -> TokenReward | None:
    """The named reward; raises ValueError where a parameter belongs to another one."""
    check_choice("reward", reward, ("power", "log_ratio", None))
    if reward != "log_ratio" and not (clip is None and tanh_scale is None):
        raise ValueError(f"clip and tanh_scale belong to reward='log_ratio', got reward={reward!r}")
    if reward is None:
        return None
    return TokenReward(reward, alpha, normalization, clip, tanh_scale)


def _check_sources(
    reward: str | None, teacher_logprobs: Tensor | None, advantages: Tensor | None
) -> None:
    """A reward needs the teacher's log-probs; without a reward there must be advantages."""
    if reward is None and advantages is None:
        raise ValueError("advantages must be given with reward=None, got None")
    if (reward is None) != (teacher_logprobs is None):
        given = "None" if teacher_logprobs is None else "a tensor"
        raise ValueError(
            f"teacher_logprobs must be given exactly where there is a reward, got {given} with "
            f"reward={reward!r}"
        )


def _taken(x: Tensor | None, active: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A constant [T] at the active tokens, [n]."""
    return None if x is None else x.detach().index_select(0, active).to(dtype)
