"""The rows of the benchmark: a kernel in a mode, what it is checked against, and who takes part."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from benchmarks.kernels.peers import NAIVE, Peer
from benchmarks.kernels.problem import ALPHA, BAND, CLIP, Problem


class Outcome(NamedTuple):
    """What a call gives: values [T] in nats (or the loss alone, where a provider has no more) and
    gradients."""

    values: Tensor | None = None
    loss: Tensor | None = None
    grads: tuple[Tensor, ...] = ()


Call = Callable[[Problem], Outcome]


@dataclass(frozen=True)
class Provider:
    """`call` is None where the provider cannot run, for the `reason`; `prepare` runs untimed before
    each call."""

    name: str
    call: Call | None
    reason: str = ""
    prepare: Callable[[Problem], None] | None = None
    full_logits: bool = False


@dataclass(frozen=True)
class Row:
    """flops and traffic (bytes) are the least that the row's result takes, whoever makes it.

    letters: the sizes that matter to the row; copies: about how many [T, V] float32 tensors the
    naive code holds."""

    suite: str
    kernel: str
    mode: str
    letters: str
    ability: str
    truth: str
    call: Callable[[Callable, Problem], Outcome]
    traffic: Callable[[Problem], float]
    flops: Callable[[Problem], float] = lambda p: 0.0
    own: Call | None = None
    extras: tuple[Provider, ...] = ()
    masked: bool = False
    copies: int = 0

    def providers(self, peers: dict[str, Peer]) -> list[Provider]:
        """Ours first, then those of the named peers that have anything for the row."""
        found = [Provider("ours", self.own or partial(self.call, OURS[self.ability])), *self.extras]
        for name, peer in peers.items():
            function = peer.get(self.ability)
            if isinstance(function, str):
                found.append(Provider(name, None, function))
            elif function is not None:
                found.append(
                    Provider(
                        name, partial(self.call, function), full_logits=name in ("torch", "compile")
                    )
                )
        return found


def _no_grad(f: Callable, *inputs: object) -> Outcome:
    with torch.no_grad():
        out = f(*inputs)
    return Outcome(out[0] if isinstance(out, tuple) else out)


def _upstream(values: Tensor, p: Problem, *inputs: Tensor) -> Outcome:
    return Outcome(values, grads=torch.autograd.grad(values, inputs, p.upstream))


def _scalar(loss: Tensor, values: Tensor | None, *inputs: Tensor) -> Outcome:
    return Outcome(values, loss.detach(), torch.autograd.grad(loss, inputs))


def _selective(f: Callable, p: Problem) -> Outcome:
    return _no_grad(f, p.logits, p.ids)


def _selective_grad(f: Callable, p: Problem) -> Outcome:
    return _upstream(f(p.logits, p.ids), p, p.logits)


def _in_place(p: Problem) -> Outcome:
    out = kernels.selective_logprobs(p.scratch_logits, p.ids, inplace_backward=True)
    return _upstream(out.logprobs, p, p.scratch_logits)


def _restore_scratch(p: Problem) -> None:
    p.scratch_logits.data.copy_(p.logits.data)


def _scoring(f: Callable, p: Problem) -> Outcome:
    return _no_grad(f, p.hidden, p.weight, p.ids, None)


def _recompute(f: Callable, p: Problem) -> Outcome:
    return _upstream(f(p.hidden, p.weight, p.ids, None), p, p.hidden, p.weight)


def _one_shot(p: Problem) -> Outcome:
    out = kernels.fused_linear_opd_loss(
        p.hidden,
        p.weight,
        p.ids,
        p.teacher_logprobs,
        denominator=p.active,
        reward="power",
        alpha=ALPHA,
        mask=p.mask,
    )
    return _scalar(out.loss, out.logprobs, p.hidden, p.weight)


def _opd(f: Callable, p: Problem, score_first: bool = False) -> Outcome:
    """Log-probs of a peer, then the reward and the loss in eager torch.

    score_first: a separate pass without gradient makes the reward's log-probs, as PowerOPD's
    released code does."""
    scored = _no_grad(f, p.hidden, p.weight, p.ids, p.mask).values if score_first else None
    values = f(p.hidden, p.weight, p.ids, p.mask)
    reward = NAIVE["power"](p.teacher_logprobs, values.detach() if scored is None else scored)
    terms = reward * values if p.mask is None else reward * values * p.mask
    return _scalar(-terms.sum() / p.active, values, p.hidden, p.weight)


def _divergence(out: Tensor | kernels.DivergenceOutput, *inputs: Tensor) -> Outcome:
    """Of a provider's KL per token, of the mean where that is all there is, or of our output."""
    if isinstance(out, kernels.DivergenceOutput):
        return _scalar(out.loss, out.divergence, *inputs)
    return _scalar(out.mean(), out.detach() if out.ndim else None, *inputs)


def _kl(f: Callable, p: Problem) -> Outcome:
    return _divergence(f(p.logits, p.teacher_logits, True), p.logits)


def _fused_kl(f: Callable, p: Problem) -> Outcome:
    return _divergence(
        f(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, True), p.hidden, p.weight
    )


def _two_heads(f: Callable, p: Problem) -> Outcome:
    """A kernel for two models, given the one head twice."""
    return _divergence(
        f(p.hidden, p.weight, p.view_hidden, p.weight.detach(), False), p.hidden, p.weight
    )


def _one_head(p: Problem) -> Outcome:
    return _divergence(
        kernels.fused_linear_self_distillation_kl(
            p.hidden, p.view_hidden, p.weight, denominator=p.T
        ),
        p.hidden,
        p.weight,
    )


def _reward(f: Callable, p: Problem) -> Outcome:
    return Outcome(f(p.teacher_logprobs, p.logprobs.detach()))


def _ppo(f: Callable, p: Problem) -> Outcome:
    return _scalar(f(p.logprobs, p.old_logprobs, p.upstream, p.mask, p.active), None, p.logprobs)


def _direction(reverse: bool) -> str:
    return "reverse_kl" if reverse else "forward_kl"


OURS: Peer = {
    "selective": lambda logits, ids: kernels.selective_logprobs(logits, ids, return_entropy=True),
    "selective_grad": lambda logits, ids: kernels.selective_logprobs(logits, ids).logprobs,
    "logprobs": lambda x, w, ids, mask: (
        kernels.fused_linear_logprobs(x, w, ids, mask=mask).logprobs
    ),
    "kl": lambda student, teacher, reverse: kernels.distillation_divergence(
        student, teacher, divergence=_direction(reverse), denominator=len(student)
    ),
    "fused_kl": lambda x, w, xt, wt, reverse: kernels.fused_linear_distillation_divergence(
        x, w, xt, wt, divergence=_direction(reverse), denominator=len(x)
    ),
    "power": lambda teacher, student: kernels.power_reward(teacher, student, ALPHA),
    "log_ratio": lambda teacher, student: kernels.log_ratio_reward(teacher, student, clip=CLIP),
    "ppo": lambda lp, old, advantages, mask, n: (
        kernels.policy_gradient_loss(
            lp,
            advantages,
            denominator=n,
            mask=mask,
            old_logprobs=old,
            objective="ppo_clip",
            clip_low=BAND,
            clip_high=BAND,
        ).loss
    ),
}


def _gemms(count: int) -> Callable[[Problem], float]:
    """FLOPs of that many [active tokens, H, V] products."""
    return lambda p: 2.0 * count * p.active * p.H * p.V


def _head(hidden: int, weights: int) -> Callable[[Problem], float]:
    """Bytes of that many [active tokens, H] and [V, H] tensors, read or written once."""
    return lambda p: float(p.dtype.itemsize * p.H * (hidden * p.active + weights * p.V))


def _logits(count: int) -> Callable[[Problem], float]:
    return lambda p: float(count * p.dtype.itemsize * p.T * p.V)


def _tokens(size: int) -> Callable[[Problem], float]:
    return lambda p: float(size * p.T)


ROWS = (
    Row("reward", "power_reward", "fwd", "T", "power", "power", _reward, _tokens(12)),
    Row("reward", "log_ratio_reward", "fwd", "T", "log_ratio", "log_ratio", _reward, _tokens(12)),
    Row(
        "reward",
        "policy_gradient_loss",
        "fwd+bwd",
        "T",
        "ppo",
        "ppo",
        _ppo,
        _tokens(17),
        masked=True,
    ),
    Row(
        "head",
        "selective_logprobs",
        "fwd",
        "TV",
        "selective",
        "logits logprobs",
        _selective,
        _logits(1),
        copies=4,
    ),
    Row(
        "head",
        "selective_logprobs",
        "fwd+bwd",
        "TV",
        "selective_grad",
        "logits logprobs",
        _selective_grad,
        _logits(3),
        copies=4,
        extras=(Provider("ours in place", _in_place, prepare=_restore_scratch),),
    ),
    Row(
        "head",
        "scoring",
        "fwd",
        "THV",
        "logprobs",
        "logprobs",
        _scoring,
        _head(1, 1),
        _gemms(1),
        copies=3,
    ),
    Row(
        "head",
        "recompute",
        "fwd+bwd",
        "THV",
        "logprobs",
        "logprobs",
        _recompute,
        _head(2, 2),
        _gemms(4),
        copies=5,
    ),
    Row(
        "head",
        "opd_one_shot",
        "fwd+bwd",
        "THV",
        "logprobs",
        "opd",
        _opd,
        _head(2, 2),
        _gemms(3),
        own=_one_shot,
        masked=True,
        copies=5,
        extras=(
            Provider(
                "poweropd", partial(_opd, NAIVE["logprobs"], score_first=True), full_logits=True
            ),
        ),
    ),
    Row(
        "kl",
        "distillation_divergence",
        "fwd+bwd",
        "TV",
        "kl",
        "logits reverse_kl",
        _kl,
        _logits(5),
        copies=8,
    ),
    Row(
        "kl",
        "linear_divergence",
        "fwd+bwd",
        "THV",
        "fused_kl",
        "reverse_kl",
        _fused_kl,
        _head(3, 3),
        _gemms(4),
        copies=9,
    ),
    Row(
        "kl",
        "self_distillation",
        "fwd+bwd",
        "THV",
        "fused_kl",
        "forward_kl",
        _two_heads,
        _head(3, 2),
        _gemms(4),
        own=_one_head,
        copies=9,
        extras=(Provider("ours, two heads", partial(_two_heads, OURS["fused_kl"])),),
    ),
)
