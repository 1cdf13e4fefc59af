"""What is right: the reference in float64, from the inputs as every provider gets them.

Log-probs are compared at sampled tokens and dX at the same tokens. dW is compared at sampled
vocabulary ids, whose rows sum over all tokens. So the oracle is cheap beside the providers at any
shape: it holds a chunk of rows' logits at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels import reference
from benchmarks.kernels.problem import ALPHA, BAND, CLIP, Problem

# Logits of a chunk of rows; autograd holds a few float64 tensors of that size.
CHUNK_ELEMENTS = 2**24


class Truth(NamedTuple):
    """What the oracle says of one row of the benchmark.

    values [T] float64 are in nats; grads has (index, gradient rows at it) per gradient.
    """

    values: Tensor
    loss: Tensor
    grads: tuple[tuple[Tensor, Tensor], ...]


def truth_of(p: Problem, kind: str) -> Truth:
    """The truth of a kind: power, log_ratio and ppo are from log-probs.

    logprobs, opd, reverse_kl and forward_kl are from hidden states and heads; with the prefix
    "logits " they are from logits.
    """
    with torch.no_grad():
        if kind in ("power", "log_ratio", "ppo"):
            return token_truth(p, kind)
        if kind.startswith("logits "):
            return logits_truth(p, kind.removeprefix("logits "))
        return head_truth(p, kind)


def token_truth(p: Problem, kind: str) -> Truth:
    """Rewards, or the clipped policy-gradient loss, from log-probs."""
    logprobs, teacher = p.logprobs.double(), p.teacher_logprobs.double()
    if kind == "power":
        values = reference.token_reward(teacher, logprobs, alpha=ALPHA)
        return Truth(values, values.sum(), ())
    if kind == "log_ratio":
        values = reference.token_reward(teacher, logprobs, reward="log_ratio", clip=CLIP)
        return Truth(values, values.sum(), ())
    with torch.enable_grad():
        logprobs = logprobs.detach().requires_grad_()
        values = reference.policy_loss(
            logprobs,
            p.upstream.double(),
            p.old_logprobs.double(),
            objective="ppo_clip",
            clip_low=BAND,
            clip_high=BAND,
        )
        values = values * _keep(p) / p.active
        (grad,) = torch.autograd.grad(values.sum(), logprobs)
    values = values.detach()
    return Truth(values, values.sum(), ((p.rows, grad[p.rows]),))


def logits_truth(p: Problem, kind: str) -> Truth:
    """From given logits [T, V]."""
    given = [p.logits, p.teacher_logits] if kind.endswith("kl") else [p.logits]
    grad = torch.empty(len(p.rows), p.V, dtype=torch.float64, device=p.logits.device)

    def keep(rows: Tensor, inside: Tensor, by_logits: Tensor) -> None:
        grad[inside] = by_logits[p.rows[inside] - rows[0]]

    values, loss = _by_chunks(p, kind, lambda rows: [z[rows].double() for z in given], keep)
    return Truth(values, loss, ((p.rows, grad),))


def head_truth(p: Problem, kind: str) -> Truth:
    """From hidden states [T, H] and heads [V, H]; the forward KL is of two views of one head."""
    heads = _heads(p, kind)
    weight = heads[0][1]
    dx, dw = weight.new_empty(len(p.rows), p.H), weight.new_zeros(len(p.columns), p.H)

    def logits(rows: Tensor) -> list[Tensor]:
        return [reference.head_logits(hidden[rows], weight) for hidden, weight in heads]

    def keep(rows: Tensor, inside: Tensor, by_logits: Tensor) -> None:
        dx[inside] = by_logits[p.rows[inside] - rows[0]] @ weight
        dw.addmm_(by_logits[:, p.columns].t(), p.hidden[rows].double())

    values, loss = _by_chunks(p, kind, logits, keep)
    return Truth(values, loss, ((p.rows, dx), (p.columns, dw)))


def _heads(p: Problem, kind: str) -> list[tuple[Tensor, Tensor]]:
    """(hidden, float64 weight) of the student and, for a divergence, of the teacher."""
    student = p.hidden, p.weight.double()
    if kind == "reverse_kl":
        return [student, (p.teacher_hidden, p.teacher_weight.double())]
    return [student, (p.view_hidden, student[1])] if kind == "forward_kl" else [student]


def _by_chunks(
    p: Problem,
    kind: str,
    logits: Callable[[Tensor], list[Tensor]],
    keep: Callable[[Tensor, Tensor, Tensor], None],
) -> tuple[Tensor, Tensor]:
    """values [T] and the loss.

    `logits(rows)` makes the models' float64 logits of a chunk. `keep(rows, inside, by_logits)` sees
    its gradient [n, V]; `inside` says which of p.rows are among the chunk's rows.
    """
    values, terms = torch.empty(2, p.T, dtype=torch.float64, device=p.point.device)
    size = max(1, CHUNK_ELEMENTS // p.V)
    for start in range(0, p.T, size):
        rows = torch.arange(start, min(start + size, p.T), device=p.point.device)
        values[rows], terms[rows], by_logits = _chunk(p, kind, rows, *logits(rows))
        keep(rows, (p.rows >= start) & (p.rows < start + size), by_logits)
    return values, terms.sum()


def _chunk(
    p: Problem, kind: str, rows: Tensor, student: Tensor, teacher: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(values [n], loss terms [n], gradient [n, V]) of the rows' logits [n, V]."""
    student = student.detach().requires_grad_()
    with torch.enable_grad():
        if kind.endswith("kl"):
            values = reference.divergence(
                student.log_softmax(-1), teacher.log_softmax(-1), divergence=kind
            )
            terms = values / p.T
        else:
            values = reference.token_logprobs(student, p.ids[rows])
            terms = values * _weights(p, kind, rows, values.detach())
        (grad,) = torch.autograd.grad(terms.sum(), student)
    return values.detach(), terms.detach(), grad


def _weights(p: Problem, kind: str, rows: Tensor, logprobs: Tensor) -> Tensor:
    """The derivative of the loss by each of the rows' log-probs [n]."""
    if kind == "logprobs":
        return p.upstream[rows].double()
    reward = reference.token_reward(p.teacher_logprobs[rows].double(), logprobs, alpha=ALPHA)
    return -reward * _keep(p)[rows] / p.active


def _keep(p: Problem) -> Tensor:
    """1 at unmasked tokens and 0 at masked ones, [T] float64."""
    return torch.ones_like(p.upstream, dtype=torch.float64) if p.mask is None else p.mask.double()
