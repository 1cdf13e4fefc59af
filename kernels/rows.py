"""Row mathematics of a softmax over logits: running statistics, log-probs, and their gradient.

A block is logits [n, N] of n rows and N neighbouring vocabulary columns, with per-row vectors
beside it. The functions here are where the kernels of triton_rows.py take over from torch: around
them are GEMMs and bookkeeping."""

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


def fold(z: Tensor, m: Tensor, l: Tensor, q: Tensor | None) -> None:
    """Fold logits z [n, N] into m = max z, l = sum e^(z-m) and q = sum e^(z-m) (z-m), all [n], in
    place."""
    new_m = torch.maximum(m, z.amax(1))
    shift = new_m.masked_fill(new_m == -torch.inf, 0)  # -inf - -inf is NaN
    x = z - shift[:, None]
    old = m - shift
    decay = old.exp()
    if q is None:
        l.mul_(decay).add_(x.exp_().sum(1))
    else:
        e = x.exp()
        q.add_(l * old.clamp_min_(FLOOR)).mul_(decay).add_(x.clamp_min_(FLOOR).mul_(e).sum(1))
        l.mul_(decay).add_(e.sum(1))
    m.copy_(new_m)


class RowStats:
    """Running softmax statistics of n rows, fed block by block; ids [n, K] are the target tokens,
    if any."""

    def __init__(
        self,
        n: int,
        dtype: torch.dtype,
        device: torch.device,
        ids: Tensor | None = None,
        entropy: bool = False,
    ) -> None:
        self.m = torch.full((n,), -torch.inf, dtype=dtype, device=device)
        self.l = torch.zeros(n, dtype=dtype, device=device)
        self.q = torch.zeros(n, dtype=dtype, device=device) if entropy else None
        self.ids = ids
        self.target = None if ids is None else torch.zeros(ids.shape, dtype=dtype, device=device)

    def fold(self, rows: slice, z: Tensor, v0: int) -> None:
        """The rows' logits z [n, N] of the columns v0..v0+N; a target's logit is the number that
        enters l."""
        if use_triton(z):
            from kernels import triton_rows

            triton_rows.fold(
                z,
                *(
                    None if x is None else x[rows]
                    for x in (self.m, self.l, self.q, self.ids, self.target)
                ),
                v0,
            )
            return
        fold(z, self.m[rows], self.l[rows], None if self.q is None else self.q[rows])
        if self.ids is not None:
            local = self.ids[rows] - v0
            inside = (local >= 0) & (local < z.shape[1])
            picked = z.gather(1, local.clamp_(0, z.shape[1] - 1))
            self.target[rows] = torch.where(inside, picked, self.target[rows])

    def fold_logits(self, logits: Tensor, rows: Tensor, vocab: int, temperature: float) -> None:
        """The first `vocab` columns of the given rows of logits [T, V], over the temperature."""
        if use_triton(logits):
            from kernels import triton_rows

            triton_rows.fold(
                unit_stride(logits),
                self.m,
                self.l,
                self.q,
                self.ids,
                self.target,
                0,
                columns=vocab,
                rows=rows,
                scale=1 / temperature,
            )
            return
        for at, some in row_blocks(rows, vocab):
            self.fold(at, load_logits(logits, some, vocab, temperature, self.m.dtype), 0)

    def final(self) -> "Softmax":
        m, l = self.m, self.l
        shift = m.masked_fill(m == -torch.inf, 0)
        safe = l.masked_fill(l == 0, 1)  # a row of -inf only: log-probs -inf, entropy 0, no NaN
        log_l = safe.log()
        return Softmax(
            shift,
            safe,
            log_l,
            shift + l.log(),
            # (z - m) - log l, not z - lse: a large common offset would cost the low
            # digits
            None if self.ids is None else (self.target - shift[:, None]) - log_l[:, None],
            None if self.q is None else log_l - self.q / safe,
        )


class Softmax:
    """Finished statistics of n rows: shift, l, log_l, lse, entropy [n] and target log-probs [n,
    K]."""

    def __init__(
        self,
        shift: Tensor,
        l: Tensor,
        log_l: Tensor,
        lse: Tensor,
        logprobs: Tensor | None,
        entropy: Tensor | None,
    ) -> None:
        self.shift, self.l, self.log_l, self.lse = shift, l, log_l, lse
        self.logprobs, self.entropy = logprobs, entropy

    @property
    def max_logprob(self) -> Tensor:
        """The argmax token's log-prob: its logit is the shift itself."""
        return -self.log_l

    def log_probs(self, z: Tensor, at: slice = slice(None)) -> Tensor:
        """The logits z [n, N] of the rows `at` as log-probs."""
        return z.sub(self.shift[at, None]).sub_(self.log_l[at, None])


class LogprobGrad(NamedTuple):
    """A gradient by row outputs, and what turns it into one by logits; [n] tensors, None stands for
    zero.

    The function differentiated is sum(g_target * logprobs + g_lse * lse + g_entropy * entropy),
    where logprobs and g_target [n, K] belong to the target ids [n, K]."""

    shift: Tensor
    l: Tensor
    ids: Tensor
    g_target: Tensor
    g_lse: Tensor | None = None
    g_entropy: Tensor | None = None
    entropy: Tensor | None = None

    def part(self, at: slice) -> "LogprobGrad":
        return LogprobGrad(*(None if x is None else x[at] for x in self))

    def by_logits_(self, z: Tensor, v0: int, dtype: torch.dtype) -> Tensor:
        """The gradient by the logits z [n, N] of the columns v0..v0+N, in `dtype`; z may be
        overwritten.

        With p = softmax(z): d logprob_k = onehot_k - p, d lse = p, d entropy = -p (log p +
        entropy)."""
        if use_triton(z):
            from kernels import triton_rows

            out = torch.empty(z.shape, dtype=dtype, device=z.device)
            triton_rows.logprob_grad(z, out, *self, v0)
            return out
        return self._by_logits_(z, v0).to(dtype)

    def write_logits_grad(
        self, logits: Tensor, grad: Tensor, rows: Tensor, vocab: int, temperature: float
    ) -> None:
        """The gradient by the given rows of logits [T, V] over the temperature, into those rows of
        grad [T, V]."""
        if use_triton(logits):
            from kernels import triton_rows

            out = unit_stride(grad)
            triton_rows.logprob_grad(
                unit_stride(logits),
                out,
                *self,
                0,
                columns=vocab,
                rows=rows,
                scale=1 / temperature,
                out_scale=1 / temperature,
            )
            if out.data_ptr() != grad.data_ptr():
                grad.copy_(out)
            return
        for at, some in row_blocks(rows, vocab):
            z = load_logits(logits, some, vocab, temperature, self.l.dtype)
            dz = self.part(at)._by_logits_(z, 0)
            grad[:, :vocab].index_copy_(0, some, dz.div_(temperature).to(grad.dtype))

    def _by_logits_(self, z: Tensor, v0: int) -> Tensor:
        of_p = -self.g_target.sum(1)
        if self.g_lse is not None:
            of_p = of_p + self.g_lse
        z.sub_(self.shift[:, None])
        if self.g_entropy is None:
            z.exp_().mul_((of_p / self.l)[:, None])
        else:
            constant = of_p - self.g_entropy * (self.entropy - self.l.log())
            e = z.exp()
            z.clamp_min_(FLOOR).mul_((-self.g_entropy / self.l)[:, None])
            z.add_((constant / self.l)[:, None]).mul_(e)
        local = self.ids - v0
        inside = (local >= 0) & (local < z.shape[1])
        return z.scatter_add_(
            1, local.clamp_(0, z.shape[1] - 1), torch.where(inside, self.g_target, 0)
        )


def row_blocks(rows: Tensor, columns: int) -> list[tuple[slice, Tensor]]:
    """Blocks of rows that hold about a cache's worth of logits: (positions among the rows,
    indices)."""
    size = max(1, _BLOCK_ELEMENTS // columns)
    return [(slice(i, i + size), rows[i : i + size]) for i in range(0, len(rows), size)]


def load_logits(
    logits: Tensor, some: Tensor, vocab: int, temperature: float, dtype: torch.dtype
) -> Tensor:
    """A fresh copy of some rows' valid logits, over the temperature."""
    z = logits.detach()[:, :vocab].index_select(0, some).to(dtype)
    return z if temperature == 1 else z.div_(temperature)


def unit_stride(logits: Tensor) -> Tensor:
    """logits [T, V] with neighbouring columns side by side, as the Triton kernels walk them."""
    logits = logits.detach()
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def gradient_buffer(logits: Tensor, rows: Tensor, vocab: int, inplace: bool) -> Tensor:
    """Where the gradient of logits goes: zero outside the given rows and the valid columns."""
    if not inplace:
        return torch.zeros_like(logits, memory_format=torch.contiguous_format)
    grad = logits.detach()
    grad[
        torch.ones(len(grad), dtype=torch.bool, device=grad.device).index_fill_(0, rows, False)
    ] = 0
    grad[:, vocab:] = 0
    return grad
