"""The divergences of docs/specification.md, 1, as formulas over whole distributions.

Each maps the student's and the teacher's log-probs [P, V] to [P]. Nothing here calls a kernel or a
reward. `NAMES` are those by which a component from outside can say what it minimises.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * (student - teacher)).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (teacher.exp() * (teacher - student)).sum(-1)


def jsd(beta: float) -> Divergence:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = student.exp(), teacher.exp()
        log_m = (beta * p + (1 - beta) * q).log()
        taught = (p * (teacher - log_m)).sum(-1)
        return beta * taught + (1 - beta) * (q * (student - log_m)).sum(-1)

    return divergence


def power(alpha: float, box_cox: bool = False) -> Divergence:
    """alpha B(q || p), B itself with `box_cox` (section B of the specification)."""

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        q, p = student.exp(), teacher.exp()
        terms = q ** (alpha + 1) - (alpha + 1) * q * p**alpha + alpha * p ** (alpha + 1)
        return terms.sum(-1) / ((alpha + 1) * (alpha if box_cox else 1))

    return divergence


def total_variation(scale: float) -> Divergence:
    """2 c TV(q, p) = c sum_v |p_v - q_v|, which the reward c sign(log p - log q) minimises."""

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        return scale * (teacher.exp() - student.exp()).abs().sum(-1)

    return divergence


def half_squares(student: Tensor, teacher: Tensor) -> Tensor:
    """Half of the squared distance of the two distributions."""
    return (student.exp() - teacher.exp()).square().sum(-1) / 2


def of_log_ratio(bend: Callable[[Tensor], Tensor]) -> Divergence:
    """The f-divergence that the reward bend(log p - log q) minimises, for an odd function `bend`.

    It is sum_v p_v F(q_v / p_v), where F' (u) = bend(log u) and F(1) = 0. The integral is made by
    Gauss-Legendre quadrature in log u, in pieces of half a nat.
    """
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(24))

    def integral(gap: Tensor) -> Tensor:
        pieces = max(1, math.ceil(2 * float(gap.detach().abs().max())))
        width = gap / pieces
        places = (torch.arange(pieces)[:, None] + (nodes + 1) / 2).flatten()
        z = width[..., None] * places
        return (weights.repeat(pieces) * bend(z) * z.exp()).sum(-1) * width / 2

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        return (teacher.exp() * integral(student - teacher)).sum(-1)

    return divergence


def tanh_of_log_ratio(scale: float) -> Divergence:
    return of_log_ratio(lambda gap: torch.tanh(gap / scale))


def clipped_log_ratio(bound: float) -> Divergence:
    """That of the log-ratio clipped to [-bound, bound], in closed form."""

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        gap = student - teacher
        inner = gap.clamp(-bound, bound)
        # The integral of log u is u log u - u + 1; beyond the bound the slope stays.
        near = inner.exp() * (inner - 1) + 1
        beyond = inner.detach() * (gap.exp() - inner.exp())
        return (teacher.exp() * (near + beyond)).sum(-1)

    return divergence


def top_k(k: int, support: str, tail: str, direction: str) -> Divergence:
    """A KL on the k most likely tokens, renormalised or with a bucket of the others."""

    def masses(logs: Tensor, ids: Tensor) -> Tensor:
        chosen = logs.gather(-1, ids)
        if tail == "renormalize":
            return chosen.log_softmax(-1)
        inside = torch.zeros_like(logs, dtype=torch.bool).scatter(-1, ids, True)
        rest = logs.exp().masked_fill(inside, 0).sum(-1, keepdim=True).log()
        return torch.cat([chosen, rest], -1)

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        ranked = teacher if support == "teacher" else student.detach()
        ids = ranked.topk(k).indices
        kl = reverse_kl if direction == "reverse_kl" else forward_kl
        return kl(masses(student, ids), masses(teacher, ids))

    return divergence


NAMES: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd(0.5),
    "half_squares": half_squares,
}
