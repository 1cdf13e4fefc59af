"""Every public function in one graph of torch.compile, against itself outside one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels

FUNCTIONS = [
    name for name in kernels.__all__ if name[0].islower() and not name.endswith("_backend")
]
OPTIONS = {"temperature": 0.8, "logit_softcap": 3.0}
RETURNED = {"return_entropy": True, "return_lse": True}


def _calls(p, x, w, b, logits, teacher):
    """Each function's call; x, w, b, logits and the teacher's may need a gradient."""
    head = {"bias": b, "mask": p.mask, **OPTIONS}
    support = torch.arange(3).expand(p.T, 3)
    on_support = teacher[:, :3].log_softmax(-1) - 1
    other = p.hidden.flip(0)
    loss = {"denominator": 3.0, "mask": p.mask, "weights": p.weights}
    k = kernels
    return {
        "selective_logprobs": lambda: k.selective_logprobs(logits, p.ids, mask=p.mask, **RETURNED),
        "fused_linear_logprobs": lambda: k.fused_linear_logprobs(x, w, p.ids, **head, **RETURNED),
        "fused_linear_topk_logprobs": lambda: k.fused_linear_topk_logprobs(x, w, 4, **head),
        "fused_linear_opd_loss": lambda: k.fused_linear_opd_loss(
            x, w, p.ids, p.teacher_logprobs, bias=b, entropy_coef=0.1, **OPTIONS, **loss
        ),
        "power_reward": lambda: k.power_reward(p.teacher_logprobs, logits[:, 0], 0.5),
        "log_ratio_reward": lambda: k.log_ratio_reward(p.teacher_logprobs, logits[:, 0], clip=1.0),
        "policy_gradient_loss": lambda: k.policy_gradient_loss(
            logits[:, 0], p.advantages, old_logprobs=teacher[:, 0], objective="ppo_clip", **loss
        ),
        "distillation_divergence": lambda: k.distillation_divergence(
            logits, teacher, token_ids=p.ids, divergence="jsd", return_entropy=True, **loss
        ),
        "fused_linear_distillation_divergence": lambda: k.fused_linear_distillation_divergence(
            x, w, p.teacher_hidden, p.teacher_weight, student_bias=b, **loss
        ),
        "fused_linear_self_distillation_kl": lambda: k.fused_linear_self_distillation_kl(
            x, other, w, top_k=5, tail="bucket", bias=b, **loss
        ),
        "topk_distillation_divergence": lambda: k.topk_distillation_divergence(
            x, w, support, on_support, bias=b, **loss
        ),
    }


def _flat(result):
    """The tensors of a result, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    fields = [[*f.values()] if isinstance(f, dict) else [f] for f in result]
    return [t for field in fields for t in field if t is not None]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traces_in_one_graph(problem, name):
    p = problem(6, 30, 5, torch.float32)
    start = (p.hidden, p.weight, p.bias, p.rand(p.T, p.V), p.rand(p.T, p.V))
    found = []
    for compiled in (False, True):
        # The teacher is a constant, whether it asks for a gradient or not.
        inputs = [t.clone().requires_grad_() for t in start]
        call = _calls(p, *inputs)[name]
        if compiled:
            torch._dynamo.reset()
            call = torch.compile(call, fullgraph=True, backend="aot_eager")
        outputs = _flat(call())
        chosen = [t for t in outputs if t.requires_grad]
        grads = []
        if chosen:
            total = sum((t * torch.arange(1.0, t.numel() + 1).view(t.shape)).sum() for t in chosen)
            grads = [g for g in torch.autograd.grad(total, inputs, allow_unused=True)]
        found.append((outputs, grads, len(chosen)))
    (plain, by_plain, count), (traced, by_traced, traced_count) = found
    assert traced_count == count
    torch.testing.assert_close(traced, plain, rtol=0, atol=0)
    for got, want in zip(by_traced, by_plain, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


class _Operators(TorchDispatchMode):
    """The project's operators that are called, each with its arguments."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "onstream":
            self.called.append((operator, args))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trace_sees_the_shapes_and_dtypes_that_come(problem, monkeypatch, dtype):
    """Every operator and those of the gradients; none changes its arguments or returns them."""
    p = problem(6, 30, 5, dtype)
    start = (p.hidden, p.weight, p.bias, p.rand(p.T, p.V), p.rand(p.T, p.V))
    inputs = [t.to(dtype).requires_grad_() for t in start]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with _Operators() as operators:
        for name in FUNCTIONS:
            outputs = [t for t in _flat(_calls(p, *inputs)[name]()) if t.requires_grad]
            if outputs:
                torch.autograd.grad(sum(t.sum() for t in outputs), inputs, allow_unused=True)
    found = {str(operator) for operator, _ in operators.called}
    assert len(found) == len(FUNCTIONS) + 2, found
    for operator, args in operators.called:
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


def test_a_teacher_that_asks_for_a_gradient_makes_no_loss_that_has_one(problem):
    p = problem(3, 12, 4, torch.float32)
    student, teacher = p.rand(3, 12), p.rand(3, 12).requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call():
        return kernels.distillation_divergence(student, teacher, denominator=1.0).loss

    assert not call().requires_grad


def test_a_wrong_argument_is_named(problem):
    p = problem(3, 12, 4, torch.float32)
    logits = p.rand(3, 12)
    call = torch.compile(kernels.selective_logprobs, backend="eager")
    with pytest.raises(TypeError, match="temprature"):
        call(logits, p.ids, temprature=1.0)
    with pytest.raises(TypeError, match="positional"):
        call(logits, p.ids, 1.0)
    with pytest.raises(IndexError, match="token_ids"):
        call(logits, p.ids + 12)
