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
from kernels.logprobs import check_head
from kernels.policy_loss import PolicyObjective, TokenLoss, loss_factors, token_loss, weighted_sum
from kernels.rewards import TokenReward
from kernels.rows import LogprobGrad, RowStats, acc_dtype
from kernels.stream import (
    HeadGrads,
    LinearHead,
    active_rows,
    make_head,
    needs_grad,
    scaled_grad,
    spread,
    stream_logits,
)


class OPDOutput(NamedTuple):
    """loss: differentiable scalar. Detached: [T] tensors in nats, 0 at masked rows, and scalar
    stats."""

    loss: Tensor
    logprobs: Tensor
    rewards: Tensor
    entropy: Tensor | None
    stats: dict[str, Tensor]


class _Tokens(NamedTuple):
    """Per-token inputs of the active rows, [n] each; factors are weight * loss_scale /
    denominator."""

    ids: Tensor
    factors: Tensor
    teacher: Tensor | None
    advantages: Tensor | None
    old: Tensor | None
    rollout: Tensor | None

    def part(self, at: slice) -> "_Tokens":
        return _Tokens(*(None if x is None else x[at] for x in self))


@dataclass(frozen=True)
class _Loss:
    """What turns log-probs into a loss."""

    reward: TokenReward | None
    objective: PolicyObjective
    entropy_coef: float

    def of(self, logprobs: Tensor, tokens: _Tokens) -> TokenLoss:
        return token_loss(
            self.objective,
            logprobs,
            tokens.factors,
            tokens.advantages,
            tokens.old,
            tokens.rollout,
            reward=self.reward,
            teacher_logprobs=tokens.teacher,
        )


class _FusedLinearOPD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        head: LinearHead,
        rows,
        tokens: _Tokens,
        loss: _Loss,
        with_entropy,
        needs,
    ):
        n, T = len(rows), len(hidden)
        grads = HeadGrads(head, hidden, needs)
        logprobs = torch.zeros_like(tokens.factors)
        entropy = torch.zeros_like(tokens.factors) if with_entropy else None
        size = head.chunk_rows(workspaces=1)
        kept = head.workspace(min(size, n)) if any(needs) else None
        for start in range(0, n, size):
            at = slice(start, start + size)
            part = tokens.part(at)
            ids = part.ids[:, None]
            stats = RowStats(len(ids), head.dtype, hidden.device, ids, with_entropy)
            stream_logits(head, hidden, rows[at], stats, kept)
            final = stats.final()
            logprobs[at] = final.logprobs[:, 0]
            if with_entropy:
                entropy[at] = final.entropy
            if any(needs):
                # The loss of a row depends on that row alone, so its gradient can be made at once.
                slope = loss.of(logprobs[at], part).slope
                g_entropy = -loss.entropy_coef * part.factors if loss.entropy_coef else None
                grad = LogprobGrad(
                    final.shift,
                    final.l,
                    ids,
                    slope[:, None],
                    g_entropy=g_entropy,
                    entropy=final.entropy,
                )
                grads.add_rows(head, hidden, rows[at], grad.by_logits_, kept)

        result = loss.of(logprobs, tokens)
        rewards = torch.zeros_like(logprobs) if result.rewards is None else result.rewards
        value = result.loss
        if loss.entropy_coef:
            value = value - loss.entropy_coef * weighted_sum(entropy, tokens.factors)
        outputs = [spread(x, rows, T) for x in (logprobs, rewards, entropy)]
        ctx.mark_non_differentiable(*(x for x in outputs if x is not None))
        ctx.save_for_backward(*grads.as_tuple())
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return value, *outputs, result.stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        return *(scaled_grad(g, upstream, d) for g, d in zip(ctx.saved_tensors, ctx.dtypes)), *[
            None
        ] * 6


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
    The reward compares teacher_logprobs with the student's own log-probs, detached: reward="power"
    is `power_reward` (PowerOPD, arXiv 2606.17199 eq. 4), "log_ratio" is `log_ratio_reward`, None is
    advantages only; reward=None with advantages of one is cross-entropy. Objectives, importance
    weights and stats are those of `policy_gradient_loss`. 3 GEMMs in all (2 with a frozen head) and
    at most a chunk of rows' logits at a time; dX and dW are accumulated in float32 (float64 for
    float64 inputs). The log-probs are bitwise those of `fused_linear_logprobs`.

    hidden [T, H], lm_head_weight [V, H], bias [V]: floating, differentiable; token_ids [T] int64;
    teacher_logprobs [T] nats (of whatever token the teacher was scored on); advantages, weights,
    old_logprobs, rollout_logprobs [T] floating, constants; mask [T] bool or uint8 (masked: loss and
    gradient exactly 0, may hold NaN or any id, costs nothing); denominator (above 0), loss_scale:
    numbers or 0-dim tensors. Returns OPDOutput(loss, logprobs [T], rewards [T] (without
    `advantages`), entropy [T] or None, stats).

    Raises TypeError, ValueError (shapes, dtypes, choices, bounds), IndexError (a token id outside
    the valid vocabulary)."""
    shapes = Shapes()
    check_head(shapes, hidden, lm_head_weight, bias, temperature, logit_softcap, mask)
    given = {
        "teacher_logprobs": teacher_logprobs,
        "advantages": advantages,
        "weights": weights,
        "old_logprobs": old_logprobs,
        "rollout_logprobs": rollout_logprobs,
    }
    for name, value in given.items():
        shapes.check(name, value, "T", optional=True)
    vocab = check_vocab(valid_vocab_size, lm_head_weight.shape[0])
    rows = active_rows(mask, len(hidden), hidden.device)
    shapes.ids("token_ids", token_ids, "T", rows, vocab)
    check_choice("reward", reward, ("power", "log_ratio", None))
    if reward != "log_ratio" and not (clip is None and tanh_scale is None):
        raise ValueError(f"clip and tanh_scale belong to reward='log_ratio', got reward={reward!r}")
    reward_of = (
        None if reward is None else TokenReward(reward, alpha, normalization, clip, tanh_scale)
    )
    if reward is None and advantages is None:
        raise ValueError("advantages must be given with reward=None, got None")
    if (reward is None) != (teacher_logprobs is None):
        given = "None" if teacher_logprobs is None else "a tensor"
        raise ValueError(
            f"teacher_logprobs must be given exactly where there is a reward, got {given} with "
            f"reward={reward!r}"
        )
    rule = PolicyObjective(objective, clip_low, clip_high, dual_clip, is_cap)
    rule.check_inputs(rollout_logprobs)
    check_number("entropy_coef", entropy_coef, low=-float("inf"), strict=False)
    check_denominator(denominator)
    check_scale("loss_scale", loss_scale)

    dtype = acc_dtype(hidden, lm_head_weight)
    head = make_head(dtype, hidden, lm_head_weight, bias, temperature, logit_softcap, vocab)

    def take(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().index_select(0, rows).to(dtype)

    factors = loss_factors(rows, weights, denominator, dtype, loss_scale)
    tokens = _Tokens(
        token_ids.index_select(0, rows),
        factors,
        take(teacher_logprobs),
        take(advantages),
        take(old_logprobs),
        take(rollout_logprobs),
    )
    loss, logprobs, rewards, entropy, stats = _FusedLinearOPD.apply(
        hidden,
        lm_head_weight,
        bias,
        head,
        rows,
        tokens,
        _Loss(reward_of, rule, entropy_coef),
        return_entropy or entropy_coef != 0,
        needs_grad(hidden, lm_head_weight, bias),
    )
    return OPDOutput(
        loss,
        logprobs,
        rewards,
        entropy if return_entropy else None,
        stats,
    )
