"""Row mathematics of a softmax over logits: running statistics, log-probs, and their gradient.

A block is logits [n, N] of n rows and N neighbouring vocabulary columns, with per-row vectors
beside it. Each function has a Triton twin in triton_rows.py; callers do the GEMMs.

`active` [n] int64 holds the positions of the unmasked tokens among the T tokens of a call. `at` is
a slice of those n.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import use_triton

# exp of it is 0 in every dtype used here, and 0 * it is 0 where 0 * -inf would be NaN.
FLOOR = -1e4
# Elements of given logits that torch works on at once.
_BLOCK_ELEMENTS = 2**20


def acc_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def slices(n: int, size: int) -> list[slice]:
    """[0, n) in pieces of `size`; the last one may reach beyond n."""
    return [slice(start, start + size) for start in range(0, n, size)]


def row_part(x: Tensor | None, at: slice) -> Tensor | None:
    return None if x is None else x[at]


def exp(x: Tensor, out: Tensor | None = None) -> Tensor:
    """e^x; on a CPU 0 from about the smallest normal number down.

    MKL's exp, which torch calls there, takes 30 to 100 times as long where it underflows. Many
    tokens of a trained model are that unlikely.
    """
    lowest = math.log(torch.finfo(x.dtype).tiny) + 0.01
    if x.device.type != "cpu" or not x.numel() or not x.min() < lowest:
        return torch.exp(x, out=out)
    found = torch.clamp(x, min=lowest, out=out).exp_()
    # A hair above e^lowest, since exp rounds.
    return torch.threshold_(found, math.exp(lowest + 0.001), 0)


def fold(z: Tensor, peak: Tensor, total: Tensor, moment: Tensor | None) -> None:
    """Fold logits z [n, N] into the running statistics [n], in place.

    With m the largest logit so far: peak = m, total = sum e^(z-m), moment = sum e^(z-m) (z-m).
    """
    new_peak = torch.maximum(peak, z.amax(1))
    # -inf - -inf is NaN.
    shift = new_peak.masked_fill(new_peak == -torch.inf, 0)
    x = z - shift[:, None]
    old = peak - shift
    decay = old.exp()
    if moment is None:
        total.mul_(decay).add_(exp(x, out=x).sum(1))
    else:
        e = exp(x)
        # What was summed relative to the old peak, seen from the new one.
        moment.add_(total * old.clamp_min_(FLOOR)).mul_(decay)
        moment.add_(x.clamp_min_(FLOOR).mul_(e).sum(1))
        total.mul_(decay).add_(e.sum(1))
    peak.copy_(new_peak)


class RowStats:
    """Running softmax statistics of n rows, fed block by block.

    ids [n, K] are the target tokens, if any; `target` [n, K] holds their logits.
    """

    def __init__(
        self,
        n: int,
        dtype: torch.dtype,
        device: torch.device,
        ids: Tensor | None = None,
        entropy: bool = False,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.peak = torch.full((n,), -torch.inf, dtype=dtype, device=device)
        self.total = zeros(n)
        self.moment = zeros(n) if entropy else None
        self.ids = ids
        self.target = None if ids is None else zeros(*ids.shape)

    def fold(self, at: slice, z: Tensor, v0: int) -> None:
        """Logits z [n, N] of the rows `at` and the columns v0..v0+N.

        A target's logit is the number that enters the total.
        """
        state = (self.peak, self.total, self.moment, self.ids, self.target)
        peak, total, moment, ids, target = (row_part(x, at) for x in state)
        if use_triton(z):
            from kernels import triton_rows

            triton_rows.fold(z, peak, total, moment, ids, target, v0)
            return
        fold(z, peak, total, moment)
        if ids is not None:
            local = ids - v0
            inside = (local >= 0) & (local < z.shape[1])
            picked = z.gather(1, local.clamp_(0, z.shape[1] - 1))
            self.target[at] = torch.where(inside, picked, target)

    def fold_logits(self, logits: Tensor, active: Tensor, vocab: int, temperature: float) -> None:
        """The first `vocab` columns of the active rows of logits [T, V], over the temperature."""
        if use_triton(logits):
            from kernels import triton_rows

            triton_rows.fold(
                unit_stride(logits),
                self.peak,
                self.total,
                self.moment,
                self.ids,
                self.target,
                0,
                columns=vocab,
                rows=active,
                scale=1 / temperature,
            )
            return
        for at in row_blocks(len(active), vocab):
            z = load_logits(logits, active[at], vocab, temperature, self.peak.dtype)
            self.fold(at, z, 0)

    def final(self) -> "Softmax":
        shift = self.peak.masked_fill(self.peak == -torch.inf, 0)
        # A row of -inf only: log-probs -inf, entropy 0, no NaN.
        total = self.total.masked_fill(self.total == 0, 1)
        log_total = total.log()
        logprobs = entropy = None
        if self.target is not None:
            # Not z - lse: a large common offset would cost the low digits.
            logprobs = (self.target - shift[:, None]) - log_total[:, None]
        if self.moment is not None:
            entropy = log_total - self.moment / total
        lse = shift + self.total.log()
        return Softmax(shift, total, log_total, lse, logprobs, entropy)


class Softmax(NamedTuple):
    """Finished statistics of n rows; the softmax is e^(z - shift) / total.

    shift, total, log_total, lse, entropy: [n]; logprobs: of the targets, [n, K].
    """

    shift: Tensor
    total: Tensor
    log_total: Tensor
    lse: Tensor
    logprobs: Tensor | None
    entropy: Tensor | None

    @property
    def max_logprob(self) -> Tensor:
        """The argmax token's log-prob [n]: its logit is the shift itself."""
        return -self.log_total

    def log_probs(self, z: Tensor, at: slice = slice(None)) -> Tensor:
        """The logits z [n, N] of the rows `at` as log-probs."""
        return z.sub(self.shift[at, None]).sub_(self.log_total[at, None])


class LogprobGrad(NamedTuple):
    """A gradient by row outputs, and what turns it into one by logits.

    The function differentiated is sum(g_target * logprobs + g_lse * lse + g_entropy * entropy).
    logprobs and g_target [n, K] belong to the target ids [n, K]; the other tensors are [n]. None
    stands for zero.
    """

    shift: Tensor
    total: Tensor
    ids: Tensor
    g_target: Tensor
    g_lse: Tensor | None = None
    g_entropy: Tensor | None = None
    entropy: Tensor | None = None

    def part(self, at: slice) -> "LogprobGrad":
        return LogprobGrad(*(row_part(x, at) for x in self))

    def by_logits_(self, z: Tensor, at: slice, v0: int, dtype: torch.dtype) -> Tensor:
        """The gradient by the logits z [n, N] of rows `at` and columns v0..v0+N, in `dtype`.

        z may be overwritten. With p = softmax(z): d logprob_k = onehot_k - p, d lse = p, and
        d entropy = -p (log p + entropy).
        """
        if use_triton(z):
            from kernels import triton_rows

            out = torch.empty(z.shape, dtype=dtype, device=z.device)
            triton_rows.logprob_grad(z, out, *self.part(at), v0)
            return out
        return self.part(at)._by_logits_(z, v0).to(dtype)

    def write_logits_grad(
        self, logits: Tensor, grad: Tensor, active: Tensor, vocab: int, temperature: float
    ) -> None:
        """Write the gradient by the active rows of logits [T, V] into those rows of grad [T, V].

        The function differentiated takes the logits over the temperature.
        """
        if use_triton(logits):
            from kernels import triton_rows

            out = unit_stride(grad)
            triton_rows.logprob_grad(
                unit_stride(logits),
                out,
                *self,
                0,
                columns=vocab,
                rows=active,
                scale=1 / temperature,
                out_scale=1 / temperature,
            )
            if out.data_ptr() != grad.data_ptr():
                grad.copy_(out)
            return
        for at in row_blocks(len(active), vocab):
            z = load_logits(logits, active[at], vocab, temperature, self.total.dtype)
            dz = self.part(at)._by_logits_(z, 0)
            grad[:, :vocab].index_copy_(0, active[at], dz.div_(temperature).to(grad.dtype))

    def _by_logits_(self, z: Tensor, v0: int) -> Tensor:
        of_p = -self.g_target.sum(1)
        if self.g_lse is not None:
            of_p = of_p + self.g_lse
        z.sub_(self.shift[:, None])
        if self.g_entropy is None:
            exp(z, out=z).mul_((of_p / self.total)[:, None])
        else:
            # log p + entropy = (z - shift) + (entropy - log total)
            constant = of_p - self.g_entropy * (self.entropy - self.total.log())
            e = exp(z)
            z.clamp_min_(FLOOR).mul_((-self.g_entropy / self.total)[:, None])
            z.add_((constant / self.total)[:, None]).mul_(e)
        local = self.ids - v0
        inside = (local >= 0) & (local < z.shape[1])
        local.clamp_(0, z.shape[1] - 1)
        return z.scatter_add_(1, local, torch.where(inside, self.g_target, 0))


def row_blocks(n: int, columns: int) -> list[slice]:
    """Blocks of n rows that hold about a cache's worth of logits each."""
    return slices(n, max(1, _BLOCK_ELEMENTS // columns))


def load_logits(
    logits: Tensor, active: Tensor, vocab: int, temperature: float, dtype: torch.dtype
) -> Tensor:
    """A fresh copy of the active rows' valid logits, over the temperature, [n, vocab]."""
    z = logits.detach()[:, :vocab].index_select(0, active).to(dtype)
    return z if temperature == 1 else z.div_(temperature)


def unit_stride(logits: Tensor) -> Tensor:
    """logits [T, V] with neighbouring columns side by side, as the Triton kernels walk them."""
    logits = logits.detach()
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def gradient_buffer(logits: Tensor, active: Tensor, vocab: int, inplace: bool) -> Tensor:
    """Where the gradient of logits goes, [T, V]: zero outside the active rows and valid columns."""
    if not inplace:
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    grad = logits.detach()
    masked = torch.ones(len(grad), dtype=torch.bool, device=grad.device)
    grad[masked.index_fill_(0, active, False)] = 0
    grad[:, vocab:] = 0
    return grad
