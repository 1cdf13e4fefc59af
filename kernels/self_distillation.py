"""Divergence between two views of one model through its one LM head (SPSD, arXiv 2606.00523)."""

import torch
from torch import Tensor

from kernels.checks import Shapes, check_choice, check_count, check_vocab
from kernels.divergence import Divergence, DivergenceOutput, check_loss
from kernels.linear_divergence import linear_divergence
from kernels.logprobs import HEAD_NAMES, check_head, fused_linear_topk_logprobs
from kernels.policy_loss import loss_factors
from kernels.rows import acc_dtype
from kernels.stream import make_head
from kernels.topk_divergence import given_log_masses, model_log_masses, support_divergence


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
    (top_k=100). top_k=None compares full vocabularies; otherwise the support is the teacher view's
    top_k tokens, with one of two tails of `topk_distillation_divergence`: "renormalize" then costs one
    LM-head GEMM (the teacher view's) and K logits per row. stop_grad="teacher": the teacher view is
    constant (neither its hidden states nor its use of the head get a gradient); "none": both views
    are differentiated, the support of a top_k being constant.

    student_hidden, teacher_hidden [T, H], lm_head_weight [V, H], bias [V] floating; divergence:
    reverse_kl, forward_kl or jsd; the other arguments and errors as in
    `topk_distillation_divergence`. Returns DivergenceOutput(loss, divergence [T], None,
    None)."""
    shapes = Shapes()
    check_head(
        shapes,
        student_hidden,
        lm_head_weight,
        bias,
        temperature,
        logit_softcap,
        mask,
        names=("student_hidden", *HEAD_NAMES[1:]),
    )
    shapes.check("teacher_hidden", teacher_hidden, "TH")
    check_choice("divergence", divergence, ("reverse_kl", "forward_kl", "jsd"))
    check_choice("stop_grad", stop_grad, ("teacher", "none"))
    check_choice("tail", tail, ("renormalize", "bucket"))
    rule = Divergence(divergence, beta=beta)
    vocab = check_vocab(valid_vocab_size, lm_head_weight.shape[0])
    rows = check_loss(shapes, len(student_hidden), mask, weights, None, vocab, denominator)
    dtype = acc_dtype(student_hidden, teacher_hidden, lm_head_weight)
    factors = loss_factors(rows, weights, denominator, dtype)
    both = stop_grad == "none"
    if top_k is None:
        head = make_head(
            dtype, student_hidden, lm_head_weight, bias, temperature, logit_softcap, vocab
        )
        return linear_divergence(
            student_hidden,
            lm_head_weight,
            bias,
            teacher_hidden,
            head,
            head,
            rows,
            None,
            factors,
            rule,
            shared=both,
        )

    check_count("top_k", top_k, vocab)
    options = {
        "bias": bias,
        "temperature": temperature,
        "logit_softcap": logit_softcap,
        "valid_vocab_size": vocab,
        "mask": mask,
    }
    top = fused_linear_topk_logprobs(teacher_hidden, lm_head_weight, top_k, **options)
    ids = top.ids.index_select(0, rows)
    ls = model_log_masses(student_hidden, lm_head_weight, ids, tail, dtype, rows, **options)
    if both:
        lt = model_log_masses(teacher_hidden, lm_head_weight, ids, tail, dtype, rows, **options)
    else:
        with torch.no_grad():
            lt = given_log_masses(top.logprobs.index_select(0, rows).to(dtype), tail)
    return support_divergence(ls, lt, rule, factors, rows, len(student_hidden))
