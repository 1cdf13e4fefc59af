"""Log-probs, entropies and top-k of a softmax, from logits or from hidden states and the LM
head."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import Shapes, check_count, check_number, check_vocab
from kernels.library import traceable
from kernels.rows import LogprobGrad, RowStats, Softmax, acc_dtype, gradient_buffer, slices
from kernels.tiled_head import (
    HeadGrads,
    HeadInputs,
    TiledHead,
    active_rows,
    needs_grad,
    spread,
    stream_logits,
)
from kernels.traced import Field


class LogprobOutput(NamedTuple):
    """Nats, float32 (float64 for float64 inputs), 0 at masked tokens.

    logprobs is like the token ids, the rest is [T]. What was not asked for is None.
    """

    logprobs: Tensor
    lse: Tensor | None
    entropy: Tensor | None
    max_logprob: Tensor | None


_LOGPROB_FIELDS = {
    "logprobs": Field("token_ids", dims=None),
    "lse": Field("token_ids", when="return_lse"),
    "entropy": Field("token_ids", when="return_entropy"),
    "max_logprob": Field("token_ids", when="return_max_logprob"),
}
_DIFFERENTIABLE = ("logprobs", "lse", "entropy")


class TopkOutput(NamedTuple):
    """ids [T, K] int64, logprobs [T, K] descending, tail_mass [T] = 1 - sum of the K
    probabilities."""

    ids: Tensor
    logprobs: Tensor
    tail_mass: Tensor


def _id_dims(ids: object) -> str:
    return "TK" if isinstance(ids, Tensor) and ids.ndim == 2 else "T"


def _as_columns(ids: Tensor, active: Tensor) -> Tensor:
    """Token ids (or gradients by their log-probs), [T] or [T, K], of the active tokens: [n, K]."""
    some = ids.index_select(0, active)
    return some[:, None] if ids.ndim == 1 else some


def _spread_outputs(
    ctx, final: Softmax, ids: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, lse, entropy, max_logprob) of all T tokens; the last is not differentiable."""
    T = len(ids)
    entropy = final.shift.new_zeros(len(active)) if final.entropy is None else final.entropy
    ctx.set_materialize_grads(False)
    max_logprob = spread(final.max_logprob, active, T)
    ctx.mark_non_differentiable(max_logprob)
    logprobs = spread(final.logprobs, active, T).reshape(ids.shape)
    return logprobs, spread(final.lse, active, T), spread(entropy, active, T), max_logprob


def _upstream(
    active: Tensor,
    saved: tuple[Tensor, ...],
    g_logprobs: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
) -> LogprobGrad:
    """Upstream gradients [T] at the active tokens; saved: their ids [n, K] and statistics [n]."""
    ids, shift, total, entropy = saved
    no_target = g_logprobs is None
    g_target = shift.new_zeros(ids.shape) if no_target else _as_columns(g_logprobs, active)
    return LogprobGrad(
        shift,
        total,
        ids,
        g_target,
        None if g_lse is None else g_lse.index_select(0, active),
        None if g_entropy is None else g_entropy.index_select(0, active),
        entropy,
    )


class _SelectiveLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ids, active, temperature, vocab, entropy, inplace):
        columns = _as_columns(ids, active)
        stats = RowStats(len(active), acc_dtype(logits), logits.device, columns, entropy)
        stats.fold_logits(logits, active, vocab, temperature)
        final = stats.final()
        ctx.args = temperature, vocab, inplace
        ctx.save_for_backward(logits, active, columns, final.shift, final.total, final.entropy)
        return _spread_outputs(ctx, final, ids, active)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logprobs, g_lse, g_entropy, _):
        logits, active, *saved = ctx.saved_tensors
        temperature, vocab, inplace = ctx.args
        upstream = _upstream(active, saved, g_logprobs, g_lse, g_entropy)
        grad = gradient_buffer(logits, active, vocab, inplace)
        upstream.write_logits_grad(logits, grad, active, vocab, temperature)
        return grad, None, None, None, None, None, None


@traceable(_LOGPROB_FIELDS, acc=["logits"], by=["logits"], of=_DIFFERENTIABLE)
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
    """log softmax(logits / temperature) at the given tokens.

    Only the gradient is a new [T, V] tensor. Columns at -inf have probability 0 and gradient 0.

    Args:
        logits: [T, V] floating, any row stride.
        token_ids: [T] or [T, K] int64.
        temperature: above 0.
        mask: [T] bool or uint8. Masked tokens give 0 and gradient 0; they may hold NaN or any id.
        valid_vocab_size: later columns are padding and take no part.
        return_entropy, return_lse, return_max_logprob: what else to return.
        inplace_backward: the backward writes the gradient into the logits' own storage. Use it only
            where nothing else reads the logits afterwards.

    Returns:
        Log-probs like token_ids; lse, entropy and max_logprob [T] where asked for. max_logprob is
        the argmax token's log-prob, detached.

    Raises:
        TypeError, ValueError: shapes, dtypes, temperature.
        IndexError: an id outside the valid vocabulary.
    """
    shapes = Shapes()
    shapes.check("logits", logits, "TV")
    shapes.check("mask", mask, "T", "bool or uint8", optional=True)
    check_number("temperature", temperature)
    vocab = check_vocab(valid_vocab_size, logits.shape[1])
    active = active_rows(mask, len(logits), logits.device)
    shapes.ids("token_ids", token_ids, _id_dims(token_ids), active, vocab)
    logprobs, lse, entropy, max_logprob = _SelectiveLogprobs.apply(
        logits, token_ids, active, temperature, vocab, return_entropy, inplace_backward
    )
    return LogprobOutput(
        logprobs,
        lse if return_lse else None,
        entropy if return_entropy else None,
        max_logprob if return_max_logprob else None,
    )


class _FusedLinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head: TiledHead, ids, active, entropy, needs):
        columns = _as_columns(ids, active)
        stats = RowStats(len(active), head.dtype, hidden.device, columns, entropy)
        kept = head.workspace(len(active), head.tiling.kept) if any(needs) else ()
        stream_logits(head, hidden, active, stats, kept)
        final = stats.final()
        ctx.head, ctx.kept = head, kept
        statistics = final.shift, final.total, final.entropy
        # weight and bias are saved so that a change in place before the backward is an error.
        ctx.save_for_backward(hidden, weight, bias, active, columns, *statistics)
        return _spread_outputs(ctx, final, ids, active)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logprobs, g_lse, g_entropy, _):
        hidden, weight, bias, active, *saved = ctx.saved_tensors
        head = ctx.head
        upstream = _upstream(active, saved, g_logprobs, g_lse, g_entropy)
        grads = HeadGrads(head, hidden, ctx.needs_input_grad[:3])
        # They are overwritten: a second backward makes its logits again.
        workspace, ctx.kept = ctx.kept, ()
        pass_rows = head.tiling.blocks * head.block_rows
        for at in slices(len(active), pass_rows):
            kept = [z[at] for z in workspace]
            by_logits = upstream.part(at).by_logits_
            grads.add_rows(head, hidden, active[at], by_logits, kept, head.block_rows)
        dx, dw, db = grads.as_tuple()
        dw = None if dw is None else dw.to(weight.dtype)
        db = None if db is None else db.to(bias.dtype)
        return dx, dw, db, *[None] * 5


@traceable(
    _LOGPROB_FIELDS,
    acc=["hidden", "lm_head_weight"],
    by=["hidden", "lm_head_weight", "bias"],
    of=_DIFFERENTIABLE,
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
    """Log-probs of given tokens under softmax(softcap(hidden @ lm_head_weight.T + bias) /
    temperature).

    Logits are streamed in float32 vocabulary tiles whatever the inputs' dtype. The backward takes
    any upstream gradient of logprobs, lse and entropy. It accumulates in float32 and skips inputs
    that need no gradient: a frozen head costs no dW.

    On the CPU up to 1.25 GiB of logits are kept for the backward, which makes the others again. On
    a GPU it makes all of them again. Without gradient nothing is kept.

    On the CPU a token's outputs are bitwise the same however the T tokens are split over calls or
    masked. Every GEMM has the same number of rows (padded) and the same columns. This rests on the
    BLAS treating the rows of one GEMM alike, which the tests check on the machine they run on.

    Args:
        hidden: [T, H] floating, differentiable.
        lm_head_weight: [V, H] floating, differentiable.
        token_ids: [T] or [T, K] int64.
        bias: [V] floating, differentiable.
        temperature: above 0; it divides the logits.
        logit_softcap: c, above 0; logits become c tanh(logits / c).
        valid_vocab_size: later rows of the head are padding and take no part.
        mask: [T] bool or uint8. Masked tokens give 0 and gradient 0 and cost nothing; they may hold
            NaN or any id.
        return_entropy, return_lse, return_max_logprob: what else to return.

    Returns:
        Log-probs like token_ids; lse, entropy and max_logprob [T] where asked for. max_logprob is
        the argmax token's log-prob, detached.

    Raises:
        TypeError, ValueError: shapes, dtypes, scalars.
        IndexError: an id outside the valid vocabulary.
    """
    given = HeadInputs(hidden, lm_head_weight, bias, temperature, logit_softcap)
    shapes = Shapes()
    given.check(shapes, mask)
    vocab = check_vocab(valid_vocab_size, lm_head_weight.shape[0])
    active = active_rows(mask, len(hidden), hidden.device)
    shapes.ids("token_ids", token_ids, _id_dims(token_ids), active, vocab)
    head = given.tiled(vocab, acc_dtype(hidden, lm_head_weight))
    logprobs, lse, entropy, max_logprob = _FusedLinearLogprobs.apply(
        hidden,
        lm_head_weight,
        bias,
        head,
        token_ids,
        active,
        return_entropy,
        needs_grad(hidden, lm_head_weight, bias),
    )
    return LogprobOutput(
        logprobs,
        lse if return_lse else None,
        entropy if return_entropy else None,
        max_logprob if return_max_logprob else None,
    )


class _TopkStats(RowStats):
    """Row statistics that also keep the k largest logits seen so far, and their ids: [n, k]."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(n, dtype, device)
        self.k = k
        self.best = torch.zeros(n, k, dtype=dtype, device=device)
        self.best_ids = torch.zeros(n, k, dtype=torch.int64, device=device)

    def fold(self, at: slice, z: Tensor, v0: int) -> None:
        super().fold(at, z, v0)
        top, columns = z.topk(min(self.k, z.shape[1]), dim=1)
        # The first tiles may have fewer than k columns between them.
        before, after = min(self.k, v0), min(self.k, v0 + z.shape[1])
        values = torch.cat([self.best[at, :before], top], 1)
        ids = torch.cat([self.best_ids[at, :before], columns + v0], 1)
        self.best[at, :after], keep = values.topk(after, dim=1)
        self.best_ids[at, :after] = ids.gather(1, keep)


@traceable(
    {
        "ids": Field("hidden", more="k", dtype=torch.int64),
        "logprobs": Field("hidden", more="k"),
        "tail_mass": Field("hidden"),
    },
    acc=["hidden", "lm_head_weight"],
)
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
    """The k most likely tokens of each position and their log-probs, without gradient.

    This is what a teacher sends for `topk_distillation_divergence`. No [T, V] tensor exists.

    Args:
        k: at least 1 and at most the valid vocabulary.

    The other arguments are those of `fused_linear_logprobs`.

    Returns:
        ids [T, k] int64, logprobs [T, k] descending, tail_mass [T] within [0, 1]; masked tokens are
        0.

    Raises:
        TypeError, ValueError: shapes, dtypes, scalars.
    """
    given = HeadInputs(hidden, lm_head_weight, bias, temperature, logit_softcap)
    given.check(Shapes(), mask)
    vocab = check_vocab(valid_vocab_size, lm_head_weight.shape[0])
    check_count("k", k, vocab)
    T, active = len(hidden), active_rows(mask, len(hidden), hidden.device)
    head = given.tiled(vocab, acc_dtype(hidden, lm_head_weight))
    stats = _TopkStats(len(active), k, head.dtype, hidden.device)
    stream_logits(head, hidden, active, stats)
    logprobs = stats.final().log_probs(stats.best)
    tail = (1 - logprobs.exp().sum(1)).clamp_(min=0)
    return TopkOutput(
        spread(stats.best_ids, active, T), spread(logprobs, active, T), spread(tail, active, T)
    )
