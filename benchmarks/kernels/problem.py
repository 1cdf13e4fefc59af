"""Inputs that look like a language model's, the same for every provider.

A token's hidden state points at a few candidate rows of the head, and the head is scaled until the
mean entropy is ENTROPY nats: gradient filters, clocks and rounding all depend on the data, and
zeros or flat softmaxes would flatter some kernels."""

from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from zlib import crc32

import torch
from torch import Tensor

ENTROPY = 0.75
CANDIDATES = 4
SAMPLES = 64
ALPHA = 1.0
CLIP = 5.0  # of the log-ratio reward
BAND = 0.2  # of the PPO ratio
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Point:
    """One shape of one row of the benchmark; `mask` is the fraction of masked tokens."""

    device: str
    dtype: str
    T: int
    H: int
    V: int
    mask: float = 0.0
    seed: int = 0

    def label(self, letters: str) -> str:
        """With the sizes of those letters."""
        sizes = " ".join(f"{letter}{getattr(self, letter)}" for letter in letters)
        return f"{sizes} {self.dtype}" + (f" mask {self.mask:g}" if self.mask else "")


class Problem:
    """Tensors of one point, made when first asked for. The student's are leaves that require
    gradients."""

    def __init__(self, point: Point) -> None:
        self.point, self.T, self.H, self.V = point, point.T, point.H, point.V
        self.dtype = DTYPES[point.dtype]

    def masked(self, fraction: float) -> "Problem":
        """The same tensors with that fraction of the tokens masked."""
        other = copy(self)
        other.point = replace(self.point, mask=fraction)
        for name in ("mask", "active"):
            other.__dict__.pop(name, None)
        return other

    def rand(self, name: str, *shape: int) -> Tensor:
        """Normal float32 numbers that depend on the name and the seed alone, not on who asks
        first."""
        return torch.randn(*shape, generator=self._generator(name), device=self.point.device)

    def integers(self, name: str, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator(name), device=self.point.device)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self.point.device).manual_seed(
            crc32(name.encode()) + self.point.seed
        )

    def _margins(self, name: str, jitter: float = 0.05) -> Tensor:
        """[T, CANDIDATES] logits of the candidates before scaling."""
        steps = torch.linspace(1.0, 0.7, CANDIDATES, device=self.point.device)
        return steps + jitter * self.rand(name, self.T, CANDIDATES)

    def _states(self, name: str, margins: Tensor, weight: Tensor) -> Tensor:
        """[T, H] hidden states of about unit elements whose logits at the candidates are about the
        margins."""
        h = 0.3 / self.H**0.5 * self.rand(name, self.T, self.H)
        for k in range(CANDIDATES):
            h.addcmul_(margins[:, k, None], weight[self._candidates[:, k]])
        return h

    @cached_property
    def _candidates(self) -> Tensor:
        return self.integers("candidates", self.V, self.T, CANDIDATES)

    @cached_property
    def _student(self) -> tuple[Tensor, Tensor, float]:
        """hidden, weight (unit rows in expectation, float32) and the scale of the logits."""
        weight = self.rand("weight", self.V, self.H).mul_(self.H**-0.5)
        hidden = self._states("hidden", self._margins("student margins"), weight)
        z = hidden[:SAMPLES] @ weight.t()
        low, high = 1.0, 100.0
        for _ in range(20):
            scale = (low * high) ** 0.5
            lp = (z * scale).log_softmax(-1)
            flat = -(lp.exp() * lp).sum(-1).mean() > ENTROPY
            low, high = (scale, high) if flat else (low, scale)
        return hidden, weight, scale

    def _store(self, x: Tensor, factor: float, leaf: bool = False) -> Tensor:
        return (x * factor).to(self.dtype).requires_grad_(leaf)

    @cached_property
    def hidden(self) -> Tensor:
        return self._store(self._student[0], self.H**0.5, leaf=True)

    @cached_property
    def weight(self) -> Tensor:
        return self._store(self._student[1], self._student[2] * self.H**-0.5, leaf=True)

    @cached_property
    def view_hidden(self) -> Tensor:
        """The other view of the same model, as in self-distillation; its KL is a few tenths of a
        nat or more."""
        return self._store(
            self._states("view", self._margins("view margins", 0.1), self._student[1]), self.H**0.5
        )

    @cached_property
    def _teacher(self) -> tuple[Tensor, Tensor]:
        weight = self.rand("teacher weight", self.V, self.H).mul_(self.H**-0.5)
        hidden = self._states("teacher hidden", self._margins("teacher margins"), weight)
        return self._store(hidden, self.H**0.5), self._store(
            weight, self._student[2] * self.H**-0.5
        )

    teacher_hidden = property(lambda self: self._teacher[0])
    teacher_weight = property(lambda self: self._teacher[1])

    @cached_property
    def ids(self) -> Tensor:
        """[T] int64, the candidates drawn about as the student would."""
        gumbel = -torch.log(-torch.log(self.rand("draw", self.T, CANDIDATES).sigmoid()))
        picked = (self._student[2] * self._margins("student margins") + gumbel).argmax(
            1, keepdim=True
        )
        return self._candidates.gather(1, picked).squeeze(1)

    @cached_property
    def base_logits(self) -> Tensor:
        """[T + 1, V]: one row more, which Liger's log-softmax wants to see at the end of a
        sequence."""
        z = self.hidden.detach() @ self.weight.detach().t()
        return torch.cat([z, z[-1:]])

    @cached_property
    def logits(self) -> Tensor:
        return self.base_logits[: self.T].detach().requires_grad_()

    @cached_property
    def scratch_logits(self) -> Tensor:
        """For a provider that writes its gradient over the logits."""
        return self.logits.detach().clone().requires_grad_()

    @cached_property
    def teacher_logits(self) -> Tensor:
        return self.teacher_hidden @ self.teacher_weight.t()

    @cached_property
    def upstream(self) -> Tensor:
        """[T] float32: the fixed gradient by the log-probs."""
        return self.rand("upstream", self.T)

    @cached_property
    def mask(self) -> Tensor | None:
        if not self.point.mask:
            return None
        keep = torch.zeros(self.T, dtype=torch.bool, device=self.point.device)
        order = self.rand("mask", self.T).argsort()
        keep[order[round(self.point.mask * self.T) :]] = True
        keep[order[-1]] = True  # never all masked
        return keep

    @cached_property
    def active(self) -> int:
        return self.T if self.mask is None else int(self.mask.sum())

    @cached_property
    def teacher_logprobs(self) -> Tensor:
        return -self.rand("teacher logprobs", self.T).abs()

    @cached_property
    def logprobs(self) -> Tensor:
        """[T] given log-probs for the token-wise kernels; old_logprobs are an earlier policy's."""
        return (-self.rand("logprobs", self.T).abs()).requires_grad_()

    @cached_property
    def old_logprobs(self) -> Tensor:
        return (self.logprobs.detach() + 0.2 * self.rand("old", self.T)).clamp_max(0)

    @cached_property
    def rows(self) -> Tensor:
        """At most SAMPLES token positions that are checked."""
        return self.integers("rows", self.T, SAMPLES).unique()

    @cached_property
    def columns(self) -> Tensor:
        """At most SAMPLES vocabulary ids whose dW rows are checked: sampled tokens and others."""
        return torch.cat(
            [self.ids[self.rows[::2]], self.integers("columns", self.V, SAMPLES // 2)]
        ).unique()
