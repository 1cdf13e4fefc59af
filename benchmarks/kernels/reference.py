"""The formulas of the kernels' specification in plain torch: the oracle of tests and benchmarks.

Every function is differentiable by autograd and computes in the dtype of its inputs, [T, V] tensors
and all. In float64 it is the oracle; in a model's dtype it is the naive code that the benchmarks
time. The library does not need this module.

Letters in shapes: T tokens, V vocabulary, H hidden, K tokens of a support. Log-probs are in nats.
"""

import torch
from torch import Tensor


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Logits [T, vocab] of hidden [T, H], weight [V, H] and bias [V].

    The GEMM and everything after it are in `dtype`.
    """
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits[:, :vocab]
    # Naive code that is timed is not charged with a division by 1.
    return logits if temperature == 1 else logits / temperature


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax of logits [T, V] at the ids [T] or [T, K], in the shape of the ids."""
    return picked(logits.log_softmax(-1), ids)


def picked(logprobs: Tensor, ids: Tensor) -> Tensor:
    """The entries of logprobs [T, V] at the ids [T] or [T, K]."""
    return logprobs.gather(1, ids.reshape(len(ids), -1)).reshape(ids.shape)


def entropy(logprobs: Tensor) -> Tensor:
    """-sum p log p [T] of finite log-probs [T, V]."""
    return -(logprobs.exp() * logprobs).sum(-1)


def token_reward(
    teacher: Tensor,
    student: Tensor,
    *,
    reward: str | None = "power",
    alpha: float = 1.0,
    normalization: str = "box_cox",
    clip: float | None = None,
    tanh_scale: float | None = None,
) -> Tensor:
    """Rewards [T] of the teacher's and the student's log-probs [T], both taken as constants.

    `reward` None is 0 everywhere.
    """
    teacher, student = teacher.detach(), student.detach()
    if reward is None:
        return torch.zeros_like(teacher)
    if reward == "power" and alpha != 0:
        gap = torch.exp(alpha * teacher) - torch.exp(alpha * student)
        return gap if normalization == "none" else gap / alpha
    log_ratio = teacher - student
    if clip is not None:
        return log_ratio.clamp(-clip, clip)
    return log_ratio if tanh_scale is None else torch.tanh(log_ratio / tanh_scale)


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    old: Tensor | None = None,
    rollout: Tensor | None = None,
    *,
    objective: str = "reinforce",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    is_cap: float | None = None,
) -> Tensor:
    """Policy-gradient losses [T] of log-probs, advantages, old and rollout log-probs, all [T].

    Without `old` the policy is its own old one; without `is_cap` nothing is reweighted.
    """
    old = logprobs.detach() if old is None else old
    ratio = torch.exp(logprobs - old)
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    if objective == "ppo_clip":
        gain = torch.minimum(ratio * advantages, bounded * advantages)
        if dual_clip is not None:
            gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
        loss = -gain
    elif objective == "cispo":
        loss = -bounded.detach() * advantages * logprobs
    else:
        loss = -advantages * logprobs
    return loss if is_cap is None else loss * torch.exp(old - rollout).clamp(max=is_cap)


def kl(of: Tensor, to: Tensor) -> Tensor:
    """KL(p || q) [T] with `of` = log p and `to` = log q, [T, V]."""
    return (of.exp() * (of - to)).sum(-1)


def divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    divergence: str,
    alpha: float = 1.0,
    normalization: str = "box_cox",
    beta: float = 0.5,
) -> Tensor:
    """Divergences [T] of the student's from the teacher's log-masses [T, V].

    The masses need not sum to 1: the KL is the generalised one, sum p log(p/q) - p + q. A power
    alpha below 1e-4 is taken as its limit, the reverse KL: the formula would lose its digits.
    """
    # TRL's convention: a JSD at the borders of beta is a KL.
    name = {("jsd", 0): "forward_kl", ("jsd", 1): "reverse_kl"}.get((divergence, beta), divergence)
    if name == "power" and alpha < 1e-4:
        name = "reverse_kl"
    q, p = student.exp(), teacher.exp()
    if name == "reverse_kl":
        return kl(student, teacher) + (p - q).sum(-1)
    if name == "forward_kl":
        return kl(teacher, student) + (q - p).sum(-1)
    if name == "power":
        terms = q ** (alpha + 1) - (alpha + 1) * q * p**alpha + alpha * p ** (alpha + 1)
        value = terms.sum(-1) / (alpha + 1)
        return value if normalization == "none" else value / alpha
    mixed = (beta * p + (1 - beta) * q).log()
    # The halves' differences of mass cancel: beta (m - p) + (1 - beta) (m - q) sums to 0.
    return beta * kl(teacher, mixed) + (1 - beta) * kl(student, mixed)


def support_log_masses(logprobs: Tensor, ids: Tensor, tail: str) -> Tensor:
    """Log-masses [T, K], or [T, K + 1] with a bucket, of the support ids [T, K].

    logprobs [T, V] are those of the full vocabulary.
    """
    on_support = logprobs.gather(1, ids)
    if tail == "renormalize":
        return on_support.log_softmax(-1)
    if tail == "ignore":
        return on_support
    outside = torch.ones_like(logprobs, dtype=torch.bool).scatter(1, ids, False)
    rest = torch.where(outside, logprobs, -torch.inf).logsumexp(1)
    return torch.cat([on_support, rest[:, None]], 1)
