"""Log-probs, entropies and top-k of a softmax, from logits or from hidden states and the LM
head."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import Shapes, check_count, check_number, check_vocab
from kernels.rows import LogprobGrad, RowStats, Softmax, acc_dtype, gradient_buffer
from kernels.stream import HeadGrads, LinearHead, active_rows, make_head, spread, stream_logits


class LogprobOutput(NamedTuple):
    """Nats, float32 (float64 for float64 inputs), 0 at masked rows; what was not asked for is
    None."""

    logprobs: Tensor
    lse: Tensor | None
    entropy: Tensor | None
    max_logprob: Tensor | None


class TopkOutput(NamedTuple):
    """ids [T, k] int64, logprobs [T, k] descending, tail_mass [T] = 1 - the sum of the k
    probabilities."""

    ids: Tensor
    logprobs: Tensor
    tail_mass: Tensor


def _id_dims(ids: object) -> str:
    return "TK" if isinstance(ids, Tensor) and ids.ndim == 2 else "T"


def _columns(ids: Tensor, rows: Tensor) -> Tensor:
    """Token ids (or their gradients) of the rows as [n, K]."""
    some = ids.index_select(0, rows)
    return some[:, None] if ids.ndim == 1 else some


def _outputs(
    ctx, stats: Softmax, ids: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[T] outputs of the function and what its backward needs of the rows."""
    T = len(ids)
    entropy = stats.shift.new_zeros(len(rows)) if stats.entropy is None else stats.entropy
    ctx.set_materialize_grads(False)
    max_logprob = spread(stats.max_logprob, rows, T)
    ctx.mark_non_differentiable(max_logprob)
    logprobs = spread(stats.logprobs, rows, T).reshape(ids.shape)
    return logprobs, spread(stats.lse, rows, T), spread(entropy, rows, T), max_logprob


def _upstream(
    rows: Tensor,
    saved: tuple[Tensor, ...],
    g_logprobs: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
) -> LogprobGrad:
    """Upstream gradients [T] at the active rows, with what `_outputs` saved of them."""
    ids, shift, l, entropy = saved
    g_target = shift.new_zeros(ids.shape) if g_logprobs is None else _columns(g_logprobs, rows)
    return LogprobGrad(
        shift,
        l,
        ids,
        g_target,
        None if g_lse is None else g_lse.index_select(0, rows),
        None if g_entropy is None else g_entropy.index_select(0, rows),
        entropy,
    )


class _SelectiveLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, rows, temperature, vocab, entropy, inplace):
        dtype = acc_dtype(logits)
        columns = _columns(ids, rows)
        stats = RowStats(len(rows), dtype, logits.device, columns, entropy)
        stats.fold_logits(logits, rows, vocab, temperature)
        final = stats.final()
        ctx.args = temperature, vocab, inplace
        ctx.save_for_backward(logits, rows, columns, final.shift, final.l, final.entropy)
        return _outputs(ctx, final, ids, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logprobs, g_lse, g_entropy, _):
        logits, rows, *saved = ctx.saved_tensors
        temperature, vocab, inplace = ctx.args
        upstream = _upstream(rows, saved, g_logprobs, g_lse, g_entropy)
        grad = gradient_buffer(logits, rows, vocab, inplace)
        upstream.write_logits_grad(logits, grad, rows, vocab, temperature)
        return grad, None, None, None, None, None, None


def selective_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    valid_vocab_size: int | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    return_max_logprob: bool = False,
    inplace_backward: bool = False,
) -> LogprobOutput:
    """log softmax(logits / temperature) at the given tokens; only the gradient is a new [T, V]
    tensor.

    logits [T, V] floating, any row stride; token_ids [T] or [T, K] int64; mask [T] bool or uint8:
    masked rows give 0 and gradient 0, and may hold NaN or any id; valid_vocab_size: later columns
    are padding and take no part. Columns at -inf have probability 0 and gradient 0.
    inplace_backward: the backward writes the gradient into the logits' own storage; use it only
    where nothing else reads the logits afterwards. Returns LogprobOutput(logprobs like token_ids,
    lse [T], entropy [T], max_logprob [T]: the argmax token's log-prob, detached), nats, float32
    (float64 for float64 inputs).

    Raises TypeError, ValueError (shapes, dtypes, temperature), IndexError (an id outside the valid
    vocabulary).
    """
    shapes = Shapes()
    shapes.check("logits", logits, "TV")
    shapes.check("mask", mask, "T", "bool or uint8", optional=True)
    check_number("temperature", temperature)
    vocab = check_vocab(valid_vocab_size, logits.shape[1])
    rows = active_rows(mask, len(logits), logits.device)
    shapes.ids("token_ids", token_ids, _id_dims(token_ids), rows, vocab)
    out = _SelectiveLogprobs.apply(
        logits, token_ids, rows, temperature, vocab, return_entropy, inplace_backward
    )
    return LogprobOutput(
        out[0],
        out[1] if return_lse else None,
        out[2] if return_entropy else None,
        out[3] if return_max_logprob else None,
    )


HEAD_NAMES = ("hidden", "lm_head_weight", "bias", "logit_softcap")


def check_head(
    shapes: Shapes,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_softcap: float | None,
    mask: Tensor | None,
    *,
    names: tuple[str, ...] = HEAD_NAMES,
    dims: str = "THV",
) -> None:
    """A head's arguments under their public names; `dims` are the letters of T, H and V."""
    t, h, v = dims
    shapes.check(names[0], hidden, t + h)
    if isinstance(weight, Tensor) and hasattr(weight, "ds_shape") and weight.numel() == 0:
        raise ValueError(
            f"{names[1]} is sharded by ZeRO-3 and not gathered: call this in the forward of the module that "
            "owns it"
        )
    shapes.check(names[1], weight, v + h)
    shapes.check(names[2], bias, v, optional=True)
    shapes.check("mask", mask, t, "bool or uint8", optional=True)
    check_number("temperature", temperature)
    check_number(names[3], logit_softcap, optional=True)


class _FusedLinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head: LinearHead, ids, rows, entropy):
        columns = _columns(ids, rows)
        stats = RowStats(len(rows), head.dtype, hidden.device, columns, entropy)
        stream_logits(head, hidden, rows, stats)
        final = stats.final()
        ctx.head = head
        # weight and bias: so that a change in place before the backward is an error
        ctx.save_for_backward(
            hidden, weight, bias, rows, columns, final.shift, final.l, final.entropy
        )
        return _outputs(ctx, final, ids, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logprobs, g_lse, g_entropy, _):
        hidden, weight, bias, rows, *saved = ctx.saved_tensors
        head = ctx.head
        upstream = _upstream(rows, saved, g_logprobs, g_lse, g_entropy)
        grads = HeadGrads(head, hidden, ctx.needs_input_grad[:3])
        size = head.block_rows
        for start in range(0, len(rows), size):
            at = slice(start, start + size)
            grads.add_rows(head, hidden, rows[at], upstream.part(at).by_logits_)
        dx, dw, db = grads.as_tuple()
        return (
            dx,
            None if dw is None else dw.to(weight.dtype),
            None if db is None else db.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def fused_linear_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    valid_vocab_size: int | None = None,
    mask: Tensor | None = None,
    return_entropy: bool = False,
    return_lse: bool = False,
    return_max_logprob: bool = False,
) -> LogprobOutput:
    """Log-probs of the given tokens under softmax(softcap(hidden @ lm_head_weight.T + bias) /
    temperature).

    No [T, V] tensor exists: logits are streamed in float32 vocabulary tiles whatever the inputs'
    dtype. The backward takes any upstream gradient (of logprobs, lse and entropy), recomputes the
    tiles, accumulates in float32 and skips inputs that need no gradient (a frozen head costs no
    dW).

    hidden [T, H], lm_head_weight [V, H], bias [V] floating; token_ids [T] or [T, K] int64;
    logit_softcap c: logits become c tanh(logits / c); valid_vocab_size: later rows of the head are
    padding and take no part; mask [T] bool or uint8: masked rows give 0 and gradient 0, may hold
    NaN or any id, and cost nothing. Returns LogprobOutput(logprobs like token_ids, lse [T], entropy
    [T], max_logprob [T]), nats, float32 (float64 for float64 inputs); max_logprob is the argmax
    token's log-prob, detached. On the CPU a row's outputs are bitwise the same however the T rows
    are split over calls or masked: every GEMM has the same number of rows (padded) and the same
    columns. This rests on the BLAS treating the rows of one GEMM alike, which the tests check on
    the machine they run on.

    Raises TypeError, ValueError (shapes, dtypes, scalars), IndexError (an id outside the valid
    vocabulary).
    """
    shapes = Shapes()
    check_head(shapes, hidden, lm_head_weight, bias, temperature, logit_softcap, mask)
    vocab = check_vocab(valid_vocab_size, lm_head_weight.shape[0])
    rows = active_rows(mask, len(hidden), hidden.device)
    shapes.ids("token_ids", token_ids, _id_dims(token_ids), rows, vocab)
    dtype = acc_dtype(hidden, lm_head_weight)
    head = make_head(dtype, hidden, lm_head_weight, bias, temperature, logit_softcap, vocab)
    out = _FusedLinearLogprobs.apply(
        hidden, lm_head_weight, bias, head, token_ids, rows, return_entropy
    )
    return LogprobOutput(
        out[0],
        out[1] if return_lse else None,
        out[2] if return_entropy else None,
        out[3] if return_max_logprob else None,
    )


class _TopkStats(RowStats):
    """Row statistics that also keep the k largest logits seen so far."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(n, dtype, device)
        self.k = k
        self.best = torch.zeros(n, k, dtype=dtype, device=device)
        self.best_ids = torch.zeros(n, k, dtype=torch.int64, device=device)

    def fold(self, rows: slice, z: Tensor, v0: int) -> None:
        super().fold(rows, z, v0)
        top, at = z.topk(min(self.k, z.shape[1]), dim=1)
        had, have = min(self.k, v0), min(self.k, v0 + z.shape[1])
        values = torch.cat([self.best[rows, :had], top], 1)
        ids = torch.cat([self.best_ids[rows, :had], at + v0], 1)
        self.best[rows, :have], keep = values.topk(have, dim=1)
        self.best_ids[rows, :have] = ids.gather(1, keep)


@torch.no_grad()
def fused_linear_topk_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    valid_vocab_size: int | None = None,
    mask: Tensor | None = None,
) -> TopkOutput:
    """The k most likely tokens of each row and their log-probs, without gradient and without a [T,
    V] tensor.

    What a teacher sends for `topk_distillation_divergence`. Arguments as in
    `fused_linear_logprobs`; k is at least 1 and at most the valid vocabulary. Returns
    TopkOutput(ids [T, k] int64, logprobs [T, k] nats, descending, tail_mass [T] within [0, 1]);
    masked rows are 0. Raises TypeError or ValueError."""
    shapes = Shapes()
    check_head(shapes, hidden, lm_head_weight, bias, temperature, logit_softcap, mask)
    vocab = check_vocab(valid_vocab_size, lm_head_weight.shape[0])
    check_count("k", k, vocab)
    rows = active_rows(mask, len(hidden), hidden.device)
    dtype = acc_dtype(hidden, lm_head_weight)
    head = make_head(dtype, hidden, lm_head_weight, bias, temperature, logit_softcap, vocab)
    T = len(hidden)
    stats = _TopkStats(len(rows), k, head.dtype, hidden.device)
    stream_logits(head, hidden, rows, stats)
    logprobs = stats.final().log_probs(stats.best)
    tail = (1 - logprobs.exp().sum(1)).clamp_(min=0)
    return TopkOutput(
        spread(stats.best_ids, rows, T), spread(logprobs, rows, T), spread(tail, rows, T)
    )
