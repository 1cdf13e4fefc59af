"""Every kernel of packed attention against transformers' eager attention: outputs and gradients,
and which kernel a device, a type and a layout get."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rollouts.layout import Layout, from_visible, grouped
from rollouts.layout import batch as read_first
from trainers.core import attention_kernels
from trainers.core.attention_kernels import KERNELS, choose_kernel
from trainers.core.packed_row import PackedRow

HEADS, KV_HEADS, WIDTH = 4, 2, 16
VIEWS = from_visible(6, [6] * 5 + [1, 2, 2, 4, 6], views=[0] * 5 + [1] * 5)
# Interleaved sequences are plain causal ones. Each row: its layouts, or lengths; its options.
ROWS = {
    "causal": ([7, 7, 7, 5, 130, 1], {}),
    "window": ([7, 7, 5, 140, 3], {"window": 4}),
    "capped": ([7, 7, 5], {"softcap": 1.5, "scaling": 0.9}),
    "capped window": ([7, 9], {"softcap": 1.5, "window": 3}),
    "batch": ([read_first(5, 8), read_first(90, 70)], {}),
    "grouped": ([grouped([3, 4, 2], [2, 3, 5, 1], 4), grouped([60, 60, 9], [30, 30, 9])], {}),
    "scheduled": ([from_visible(9, [1, 1, 4, 6, 9])], {"scaling": 0.5}),
    "views, and a causal one": ([VIEWS, Layout(17), VIEWS], {}),
    "capped layout": ([grouped([3, 4], [2, 3]), VIEWS], {"softcap": 1.5}),
}
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
WAYS = [
    ("cpu", "each"),
    ("cpu", "flex"),
    *(pytest.param("cuda", name, marks=ON_GPU) for name in ("each", "flex", "flash")),
]


def packed_row(name, device="cpu") -> PackedRow:
    content, _ = ROWS[name]
    plain = all(isinstance(entry, int) for entry in content)
    lengths = content if plain else [layout.length for layout in content]
    bounds = np.cumsum([0, *lengths]).tolist()
    return PackedRow(bounds, None if plain else content, torch.device(device))


def states(length, dtype, device="cpu", width=WIDTH):
    """Query, key and value, and what the output is weighed with."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, length, width) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    made = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    return made, torch.randn(1, length, HEADS, width, generator=generator).to(device)


def eager(tensors, name, device):
    """transformers' eager attention in float32, under one dense mask over the row."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    content, options = ROWS[name]
    row = packed_row(name, device)
    sees = np.zeros((row.bounds[-1], row.bounds[-1]), dtype=bool)
    for entry, start, end in zip(content, row.bounds, row.bounds[1:]):
        sees[start:end, start:end] = (Layout(entry) if isinstance(entry, int) else entry).mask()
    if "window" in options:
        place = np.arange(len(sees))
        sees &= place[:, None] - place < options["window"]
    mask = torch.zeros(1, 1, *sees.shape, device=device)
    mask.masked_fill_(~torch.from_numpy(sees).to(device), -torch.inf)
    module = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, training=False, head_dim=WIDTH)
    inputs = [x.detach().float().requires_grad_() for x in tensors]
    scaling, softcap = options.get("scaling", WIDTH**-0.5), options.get("softcap")
    attended, _ = eager_attention_forward(module, *inputs, mask, scaling=scaling, softcap=softcap)
    return attended, inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("device", "kernel"), WAYS)
def test_every_kernel_computes_what_eager_does(device, kernel, name, dtype):
    row, options = packed_row(name, device), ROWS[name][1]
    if kernel == "flash" and (row.layouts or "softcap" in options or dtype == torch.float32):
        pytest.skip("flash attention is for causal sequences in 16 bits")
    chosen = dtype == torch.bfloat16 and (row.layouts or "softcap" in options)
    if (device, kernel) == ("cuda", "flex") and not chosen:
        pytest.skip("flex_attention is not chosen for this, and takes seconds to compile")
    # torch's flex_attention has no backward pass on a CPU.
    learns = (device, kernel) != ("cpu", "flex")
    tensors, weights = states(row.bounds[-1], dtype, device)
    arguments = {"scaling": None, "dropout": 0.0, "window": None, "softcap": None} | options
    expected, inputs = eager(tensors, name, device)
    # Compiled for a CPU, torch 2.13's flex_attention takes a minute a length.
    stance = torch.compiler.set_stance("force_eager" if device == "cpu" else "default")
    with stance, torch.set_grad_enabled(learns):
        found = KERNELS[kernel](*(t if learns else t.detach() for t in tensors), row, **arguments)
    assert found.dtype == dtype
    # A GPU may round products of float32 to tf32.
    bound = 3e-2 if dtype == torch.bfloat16 else 1e-5 if device == "cpu" else 5e-3
    torch.testing.assert_close(found.float(), expected, atol=bound, rtol=bound)
    if not learns:
        return
    (found.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    for tensor, wanted in zip(tensors, inputs):
        error = (tensor.grad.float() - wanted.grad).norm() / wanted.grad.norm()
        assert error < bound, error


@pytest.mark.parametrize(
    ("name", "dtype", "width", "dropout", "kernel"),
    [
        ("causal", torch.bfloat16, 64, 0.0, "flash"),
        ("window", torch.float16, 256, 0.0, "flash"),
        ("causal", torch.float32, 64, 0.0, "each"),
        ("causal", torch.bfloat16, 64, 0.1, "each"),
        ("causal", torch.bfloat16, 20, 0.0, "each"),
        ("grouped", torch.bfloat16, 128, 0.0, "flex"),
        ("grouped", torch.bfloat16, 192, 0.0, "each"),
        ("grouped", torch.float32, 64, 0.0, "each"),
        ("capped", torch.bfloat16, 64, 0.0, "flex"),
    ],
)
def test_device_type_and_layout_choose_the_kernel(monkeypatch, name, dtype, width, dropout, kernel):
    monkeypatch.setattr(attention_kernels, "runs_flash", lambda device: True)
    row, softcap = packed_row(name), ROWS[name][1].get("softcap")
    for device, expected in (("cpu", "each"), ("cuda", kernel)):
        # Without a GPU there is no tensor of one. The choice reads these alone.
        states = SimpleNamespace(
            shape=(1, HEADS, row.bounds[-1], width), dtype=dtype, device=torch.device(device)
        )
        assert choose_kernel(states, states, row, dropout, softcap) == expected


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("grouped_heads", [True, False])
def test_flash_attention_is_called_as_this_torch_takes_it(monkeypatch, window, grouped_heads):
    """Its kernel runs on a GPU alone. Names, shapes and gradients are checked without values."""
    names = attention_kernels.flash_parameters()
    if not grouped_heads:  # torch 2.11
        monkeypatch.setattr(attention_kernels, "flash_parameters", lambda: names - {"enable_gqa"})
    row = packed_row("window", "meta")
    query, key, value = (
        torch.empty(1, heads, row.bounds[-1], 64, device="meta", dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    for tensor in (query, key, value):
        tensor.requires_grad_()
    found = KERNELS["flash"](query, key, value, row, None, 0.0, window, None)
    assert found.shape == (1, row.bounds[-1], HEADS, 64) and found.dtype == torch.bfloat16
    found.sum().backward()
    assert key.grad.shape == key.shape and query.grad.shape == query.shape


def test_many_rows_are_few_compilations():
    """A GPU's flex_attention is compiled for the first row, and once for rows of any length."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    counter = CompileCounterWithBackend("eager")
    make, attend = (
        torch.compile(function, backend=counter) for function in (create_block_mask, flex_attention)
    )
    rng = np.random.default_rng(0)
    for count in (3, 4, 2, 5, 6, 3):
        layouts = [grouped(rng.integers(40, 90, 3).tolist(), [50, 40]) for _ in range(count)]
        bounds = np.cumsum([0, *(layout.length for layout in layouts)]).tolist()
        row, length = PackedRow(bounds, layouts, torch.device("cpu")), bounds[-1]
        query, key, value = (tensor.detach() for tensor in states(length, torch.float32)[0])
        mask = make(row._rule(None), 1, None, length, length, torch.device("cpu"))
        attend(query, key, value, block_mask=mask, enable_gqa=True)
    assert counter.frame_count == 4  # two of each function


def test_flex_attention_is_compiled_for_whatever_asks(monkeypatch):
    """Past torch's limit of compilations a GPU would make all scores of a row."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    wrapped = object.__new__(WrappedFlexAttention)
    wrapped.training, wrapped._is_flex_compiled = False, True
    wrapped._compiled_flex_attention = torch.compile(flex_attention, backend=counter)
    monkeypatch.setattr(WrappedFlexAttention, "_instance", wrapped)
    row = packed_row("scheduled")
    with torch._dynamo.config.patch(recompile_limit=1):
        for width in (16, 32):
            tensors, _ = states(row.bounds[-1], torch.float32, width=width)
            KERNELS["flex"](*(t.detach() for t in tensors), row, None, 0.0, None, None)
    assert counter.frame_count == 2
