"""Device functions shared by the Triton kernels: accurate elementary functions, token rewards,
policy-gradient and divergence terms.

Each mirrors the torch function that its docstring names, which is its specification. Everything is
computed in the dtype of the arguments, float32 or (for tests) float64.

Of a number and NaN, tl.minimum and tl.maximum take the number. So a bound that a NaN must pass is
`at_most` or `within`.
"""

import triton
import triton.language as tl

MAX_LOG_RATIO = tl.constexpr(20.0)  # kernels.policy_loss
REWARDS = {None: 0, "power": 1, "log_ratio": 2, "clip": 3, "tanh": 4}
OBJECTIVES = {None: 0, "reinforce": 1, "ppo_clip": 2, "cispo": 3}
DIVERGENCES = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2, "power": 3}


@triton.jit
def at_most(x, bound):
    """torch.clamp_max, which keeps NaN."""
    return tl.where(x > bound, bound, x)


@triton.jit
def within(x, low, high):
    """torch.clamp, which keeps NaN."""
    return at_most(tl.where(x < low, low, x), high)


@triton.jit
def expm1(x):
    """e^x - 1 to the last digits: a Taylor polynomial in Horner form near 0."""
    terms: tl.constexpr = 18 if x.dtype == tl.float64 else 9
    series = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(terms):
        series = 1.0 + x * series / (terms - i + 1)
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x); Kahan's correction for the rounding of 1 + x."""
    u = 1.0 + x
    exact = u == 1.0
    return tl.where(exact, x, tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def tanh(x):
    e = expm1(at_most(tl.abs(x), 20.0) * 2.0)
    return tl.where(x < 0, -1.0, 1.0) * (e / (e + 2.0))


@triton.jit
def box_cox_gap(distance, alpha):
    """kernels.rewards.box_cox_gap, alpha > 0."""
    return -expm1(-alpha * distance) / alpha


@triton.jit
def token_reward(lp, lq, alpha, scale, bound, KIND: tl.constexpr):
    """kernels.rewards.TokenReward.terms; `scale` multiplies the power reward.

    KIND is of REWARDS; power with alpha = 0 arrives as log_ratio.
    """
    # A rounded log-prob may be slightly above 0.
    lp = at_most(lp, 0.0)
    lq = at_most(lq, 0.0)
    both_gone = (lp == float("-inf")) & (lq == float("-inf"))
    d = tl.where(both_gone, 0.0, lp - lq)
    if KIND == 1:
        sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))
        d = sign * tl.exp(alpha * tl.maximum(lp, lq)) * box_cox_gap(tl.abs(d), alpha) * scale
    elif KIND == 3:
        d = within(d, -bound, bound)
    elif KIND == 4:
        d = tanh(d / bound)
    return d


@triton.jit
def policy_terms(
    logprob,
    advantage,
    old,
    rollout,
    clip_low,
    clip_high,
    dual_clip,
    is_cap,
    KIND: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    DUAL: tl.constexpr,
):
    """kernels.policy_loss.PolicyObjective.terms."""
    zero = logprob * 0.0
    log_ratio = zero
    if HAS_OLD:
        log_ratio = within(logprob - old, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = tl.exp(log_ratio)
    low = zero != zero
    high = low
    capped = low
    bounded = within(ratio, 1.0 - clip_low, 1.0 + clip_high)
    if KIND == 2:
        low = (advantage < 0) & (ratio < bounded)
        high = (advantage > 0) & (ratio > bounded)
        gain = at_most(ratio * advantage, bounded * advantage)
        flat = low | high
        if DUAL:
            floor = dual_clip * advantage
            beyond = (advantage < 0) & (gain < floor)
            gain = tl.where(beyond, floor, gain)
            flat = flat | beyond
            high = high | beyond
        loss = -gain
        flat = flat | (tl.abs(log_ratio) >= MAX_LOG_RATIO)
        slope = tl.where(flat, 0.0, -ratio * advantage)
    else:
        slope = -advantage
        if KIND == 3:
            low = ratio < bounded
            high = ratio > bounded
            slope = slope * bounded
        # 0 * log 0 is 0.
        loss = tl.where(slope == 0, 0.0, slope * logprob)
    if HAS_ROLLOUT:
        trainer = logprob
        if HAS_OLD:
            trainer = old
        weight = tl.exp(within(trainer - rollout, -MAX_LOG_RATIO, MAX_LOG_RATIO))
        capped = weight > is_cap
        weight = at_most(weight, is_cap)
        loss = loss * weight
        slope = slope * weight
    return loss, slope, log_ratio, low, high, capped


@triton.jit
def bregman_terms(lq, lp, alpha, POWER: tl.constexpr):
    """kernels.divergence.bregman_terms; without POWER alpha is 0."""
    q = tl.exp(lq)
    p = tl.exp(lp)
    d = lp - lq
    gone = q == 0
    if POWER:
        power = tl.exp(alpha * lp)
        top = tl.maximum(lp, lq)
        anchor = tl.exp(alpha * top)
        gap = box_cox_gap(tl.abs(d), alpha) * tl.where(d > 0, 1.0, -1.0)
        r = tl.where(gone, 0.0, anchor * gap)
        near = q * anchor * (tl.exp(alpha * (lp - top)) * expm1(d) - gap)
        by_p = power * (p - q)
    else:
        r = tl.where(gone, 0.0, d)
        near = q * (expm1(d) - d)
        by_p = p - q
    by_q = -q * r
    value = tl.where(tl.abs(d) < 1.0, near, by_p + by_q)
    # Unlike a maximum this keeps NaN and inf.
    value = tl.where(value < 0, 0.0, value)
    if POWER:
        value = value / (alpha + 1.0)
    return value, by_q, by_p


@triton.jit
def divergence_terms(ls, lt, alpha, scale, beta, KIND: tl.constexpr):
    """kernels.divergence.Divergence.terms: (terms, derivatives by ls, by lt).

    KIND is of DIVERGENCES; `scale` multiplies the power divergence.
    """
    if KIND == 1:
        value, by_t, by_s = bregman_terms(lt, ls, alpha, False)
    elif KIND == 2:
        both_gone = (ls == float("-inf")) & (lt == float("-inf"))
        d = tl.where(both_gone, 0.0, lt - ls)
        share_of_smaller = tl.where(d > 0, 1.0 - beta, beta)
        mixed = tl.maximum(ls, lt) + log1p(share_of_smaller * expm1(-tl.abs(d)))
        of_s, by_s, _ = bregman_terms(ls, mixed, alpha, False)
        of_t, by_t, _ = bregman_terms(lt, mixed, alpha, False)
        # The mixture's own derivative cancels between the two halves
        value = beta * of_t + (1.0 - beta) * of_s
        by_s = (1.0 - beta) * by_s
        by_t = beta * by_t
    elif KIND == 3:
        value, by_s, by_t = bregman_terms(ls, lt, alpha, True)
        value = value * scale
        by_s = by_s * scale
        by_t = by_t * scale
    else:
        value, by_s, by_t = bregman_terms(ls, lt, alpha, False)
    return value, by_s, by_t
