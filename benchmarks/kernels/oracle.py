"""What is right: the same quantities in float64 by other formulas, from the inputs as every
provider gets them.

Log-probs are compared at sampled tokens, dX at the same tokens, dW at sampled vocabulary ids (whose
rows sum over all tokens), so that the oracle is cheap beside the providers at any shape."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.problem import ALPHA, BAND, CLIP, Problem


class Truth(NamedTuple):
    """What the oracle says: values [T] float64 (nats), loss, and (index, gradient rows) per
    gradient."""

    values: Tensor
    loss: Tensor
    grads: tuple[tuple[Tensor, Tensor], ...]


def _logit_gradient(
    p: Problem, kind: str, rows: Tensor, z: Tensor, zt: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(values [n], loss terms [n], gradient [n, V]) of some rows' float64 logits."""
    ls = z.log_softmax(-1)
    probs = ls.exp()
    if kind in ("logprobs", "opd"):
        ids = p.ids[rows, None]
        values = ls.gather(1, ids).squeeze(1)
        factor = p.upstream[rows].double()
        if kind == "opd":
            reward = (
                torch.exp(ALPHA * p.teacher_logprobs[rows].double()) - torch.exp(ALPHA * values)
            ) / ALPHA
            factor = -reward / p.active
            if p.mask is not None:
                factor = factor * p.mask[rows]
        dz = probs.mul_(-factor[:, None]).scatter_add_(1, ids, factor[:, None])
        return values, factor * values, dz
    lt = zt.log_softmax(-1)
    if kind == "reverse_kl":
        gap = ls.sub_(lt)
        values = (probs * gap).sum(1)
        dz = probs.mul_(gap.sub_(values[:, None]))
    else:  # forward_kl
        values = (lt.exp() * (lt - ls)).sum(1)
        dz = probs.sub_(lt.exp_())
    return values, values / p.T, dz.div_(p.T)


def _heads(p: Problem, kind: str) -> list[tuple[Tensor, Tensor]]:
    """(hidden, float64 weight) of the student and, for a divergence, of the teacher."""
    student = p.hidden, p.weight.double()
    if kind == "reverse_kl":
        return [student, (p.teacher_hidden, p.teacher_weight.double())]
    return [student, (p.view_hidden, student[1])] if kind == "forward_kl" else [student]


def logits_truth(p: Problem, kind: str) -> Truth:
    """From given logits."""
    given = [p.logits, p.teacher_logits] if kind.endswith("kl") else [p.logits]
    dz = torch.empty(len(p.rows), p.V, dtype=torch.float64, device=p.logits.device)

    def keep(rows: Tensor, inside: Tensor, gradient: Tensor) -> None:
        dz[inside] = gradient[p.rows[inside] - rows[0]]

    values, loss = _by_chunks(p, kind, lambda rows: [x[rows].double() for x in given], keep)
    return Truth(values, loss, ((p.rows, dz),))


def head_truth(p: Problem, kind: str) -> Truth:
    """From hidden states and heads; the forward KL is that of two views of one head."""
    heads = _heads(p, kind)
    weight = heads[0][1]
    dx, dw = weight.new_empty(len(p.rows), p.H), weight.new_zeros(len(p.columns), p.H)

    def keep(rows: Tensor, inside: Tensor, gradient: Tensor) -> None:
        dx[inside] = gradient[p.rows[inside] - rows[0]] @ weight
        dw.addmm_(gradient[:, p.columns].t(), p.hidden[rows].double())

    values, loss = _by_chunks(
        p, kind, lambda rows: [h[rows].double() @ w.t() for h, w in heads], keep
    )
    return Truth(values, loss, ((p.rows, dx), (p.columns, dw)))


def _by_chunks(
    p: Problem,
    kind: str,
    logits: Callable[[Tensor], list[Tensor]],
    keep: Callable[[Tensor, Tensor, Tensor], None],
) -> tuple[Tensor, Tensor]:
    """values [T] and loss; `keep(rows, which of p.rows are among them, gradient [n, V])` sees every
    chunk."""
    values, terms = torch.empty(2, p.T, dtype=torch.float64, device=p.point.device)
    size = max(1, 2**25 // p.V)
    for start in range(0, p.T, size):
        rows = torch.arange(start, min(start + size, p.T), device=p.point.device)
        values[rows], terms[rows], gradient = _logit_gradient(p, kind, rows, *logits(rows))
        keep(rows, (p.rows >= start) & (p.rows < start + size), gradient)
    return values, terms.sum()


def token_truth(p: Problem, kind: str) -> Truth:
    """Rewards and the clipped policy-gradient loss from log-probs."""
    lp, lt = p.logprobs.double(), p.teacher_logprobs.double()
    if kind == "power":
        values = (torch.exp(ALPHA * lt) - torch.exp(ALPHA * lp)) / ALPHA
        return Truth(values, values.sum(), ())
    if kind == "log_ratio":
        values = (lt - lp).clamp(-CLIP, CLIP)
        return Truth(values, values.sum(), ())
    ratio, gain = torch.exp(lp - p.old_logprobs.double()), p.upstream.double()
    keep = torch.ones_like(lp) if p.mask is None else p.mask.double()
    flat = ((gain > 0) & (ratio > 1 + BAND)) | ((gain < 0) & (ratio < 1 - BAND))
    values = -torch.minimum(ratio * gain, ratio.clamp(1 - BAND, 1 + BAND) * gain) * keep / p.active
    grad = (-ratio * gain * keep / p.active).masked_fill(flat, 0)
    return Truth(values, values.sum(), ((p.rows, grad[p.rows]),))


def truth_of(p: Problem, kind: str) -> Truth:
    """Kinds: power, log_ratio, ppo from log-probs; logprobs, opd, reverse_kl, forward_kl, also from
    logits."""
    with torch.no_grad():
        if kind in ("power", "log_ratio", "ppo"):
            return token_truth(p, kind)
        return (
            logits_truth(p, kind.removeprefix("logits "))
            if kind.startswith("logits ")
            else head_truth(p, kind)
        )
