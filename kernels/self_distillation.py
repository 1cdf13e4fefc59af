"""Divergence between two views of one model through its one LM head (SPSD, arXiv 2606.00523)."""

import torch
from torch import Tensor

from kernels.checks import Shapes, check_choice, check_count, check_vocab
from kernels.divergence import Divergence, DivergenceOutput, check_loss, divergence_fields
from kernels.library import traceable
from kernels.linear_divergence import linear_divergence
from kernels.logprobs import fused_linear_topk_logprobs
from kernels.policy_loss import loss_factors
from kernels.rows import acc_dtype
from kernels.tiled_head import HeadInputs
from kernels.topk_divergence import given_log_masses, model_log_masses, support_divergence


@traceable(
    divergence_fields("student_hidden"),
    acc=["student_hidden", "teacher_hidden", "lm_head_weight"],
    by=["student_hidden", "teacher_hidden", "lm_head_weight", "bias"],
    of=["loss"],
)
def fused_linear_self_distillation_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    lm_head_weight: Tensor,
    *,
    denominator: float | Tensor,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    stop_grad: str = "teacher",
    top_k: int | None = None,
    tail: str = "renormalize",
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    valid_vocab_size: int | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> DivergenceOutput:
    """KL or JSD of the student view from the teacher view of the same model at the same positions.

    SPSD is divergence="forward_kl", KL(teacher view || student view), on the teacher view's top 100
    (top_k=100).

    Args:
        student_hidden, teacher_hidden: [T, H] floating.
        lm_head_weight, bias: [V, H], [V] floating.
        divergence: reverse_kl, forward_kl or jsd.
        stop_grad: "teacher": the teacher view is constant; neither its hidden states nor its use of
            the head get a gradient. "none": both views are differentiated; the support of a top_k
            is constant.
        top_k: None compares full vocabularies. Otherwise the support is the teacher view's top_k
            tokens.
        tail: "renormalize" or "bucket", as in `topk_distillation_divergence`. "renormalize" costs
            one LM-head GEMM (the teacher view's) and K logits per token.

    The other arguments and the errors are as in `topk_distillation_divergence`.

    Returns:
        The loss and divergence [T]; no log-probs and no entropy.
    """
    given = (lm_head_weight, bias, temperature, logit_softcap)
    student, teacher = HeadInputs(student_hidden, *given), HeadInputs(teacher_hidden, *given)
    shapes = Shapes()
    student.check(shapes, mask, ("student_hidden", "lm_head_weight", "bias", "logit_softcap"))
    shapes.check("teacher_hidden", teacher_hidden, "TH")
    check_choice("divergence", divergence, ("reverse_kl", "forward_kl", "jsd"))
    check_choice("stop_grad", stop_grad, ("teacher", "none"))
    check_choice("tail", tail, ("renormalize", "bucket"))
    rule = Divergence(divergence, beta=beta)
    vocab = check_vocab(valid_vocab_size, lm_head_weight.shape[0])
    T = len(student_hidden)
    active = check_loss(shapes, T, mask, weights, None, vocab, denominator)
    dtype = acc_dtype(student_hidden, teacher_hidden, lm_head_weight)
    factors = loss_factors(active, weights, denominator, dtype)
    both = stop_grad == "none"
    if top_k is None:
        head = student.tiled(vocab, dtype)
        return linear_divergence(
            student, teacher_hidden, head, head, active, None, factors, rule, shared=both
        )

    check_count("top_k", top_k, vocab)
    log_s, log_t = _top_log_masses(
        student, teacher, top_k, tail, vocab, dtype, active, mask, both=both
    )
    return support_divergence(log_s, log_t, rule, factors, active, T)


def _top_log_masses(
    student: HeadInputs,
    teacher: HeadInputs,
    top_k: int,
    tail: str,
    vocab: int,
    dtype: torch.dtype,
    active: Tensor,
    mask: Tensor | None,
    *,
    both: bool,
) -> tuple[Tensor, Tensor]:
    """Both views' log-masses on the teacher view's top k; `both`: the teacher's differentiable."""
    hidden, weight, bias, temperature, softcap = teacher
    top = fused_linear_topk_logprobs(
        hidden,
        weight,
        top_k,
        bias=bias,
        temperature=temperature,
        logit_softcap=softcap,
        valid_vocab_size=vocab,
        mask=mask,
    )
    ids = top.ids.index_select(0, active)
    log_s = model_log_masses(student, ids, tail, vocab, dtype, active, mask)
    if both:
        return log_s, model_log_masses(teacher, ids, tail, vocab, dtype, active, mask)
    with torch.no_grad():
        log_t = given_log_masses(top.logprobs.index_select(0, active).to(dtype), tail)
    return log_s, log_t
