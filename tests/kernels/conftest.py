"""Small problems for every kernel, and the options that a head can have."""

from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels.backend import interpreted


@pytest.fixture(autouse=True)
def backend():
    """Under TRITON_INTERPRET=1 (test_triton_interpreter.py starts such a process) every test is one
    of Triton."""
    kernels.set_backend("triton" if interpreted() else "torch")
    yield
    kernels.set_backend("auto")


def _problem(T=7, V=23, H=5, dtype=torch.float64, seed=0, scale=1.0):
    """Student and teacher hidden states and heads, sampled tokens, a mask with one masked row."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    ids = torch.randint(0, V, (T,), generator=g)
    # both sides of a tile border
    edges = torch.tensor([0, V - 1, min(2047, V - 1), min(2048, V - 1)])
    ids[: min(T, 4)] = edges[: min(T, 4)]
    mask = torch.ones(T, dtype=torch.bool)
    mask[T // 2] = False
    return SimpleNamespace(
        T=T,
        V=V,
        H=H,
        dtype=dtype,
        hidden=rand(T, H),
        weight=rand(V, H),
        bias=rand(V),
        teacher_hidden=rand(T, H + 3),
        teacher_weight=rand(V, H + 3),
        ids=ids,
        mask=mask,
        teacher_logprobs=-rand(T).abs() * 3,
        advantages=rand(T),
        weights=rand(T).abs(),
        rand=rand,
    )


@pytest.fixture
def problem():
    return _problem


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "softcap": {"logit_softcap": 2.5},
    "valid_vocab": {"valid_vocab_size": -4},
    "all": {"bias": True, "temperature": 1.3, "logit_softcap": 3.0, "valid_vocab_size": -2},
}


@pytest.fixture(params=HEADS, ids=str)
def head(request):
    """(problem) -> the options of a head, as the public functions take them and as
    `reference.head_logits` does."""
    spec = HEADS[request.param]

    def make(p):
        options = dict(spec)
        if "bias" in options:
            options["bias"] = p.bias
        if "valid_vocab_size" in options:
            options["valid_vocab_size"] += p.V
            p.ids = p.ids.clamp(max=options["valid_vocab_size"] - 1)
        naive = {
            "bias": options.get("bias"),
            "temperature": options.get("temperature", 1.0),
            "softcap": options.get("logit_softcap"),
            "vocab": options.get("valid_vocab_size"),
        }
        return options, naive

    return make
