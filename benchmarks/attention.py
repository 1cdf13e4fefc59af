"""Packed attention: every kernel that runs on a device, side by side, forward and backward.

    python -m benchmarks.attention [--device cuda] [--tokens 8192] [--lengths 64 512 4096]
        [--rounds 5] [--out FILE]

One row of so many tokens holds sequences of one length, causal or in the grouped streaming layout.
`sdpa` and `eager` get one mask over the row, as their implementations in transformers do. A round
times all kernels in turn on the same tensors; what is printed is the median, and its ratio to
`each`. The outputs are compared first. torch's flex_attention has no backward pass on a CPU and is
not compiled there, so it is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

HEADS, KV_HEADS, WIDTH = 4, 2, 64
OPTIONS = {"scaling": None, "dropout": 0.0, "window": None, "softcap": None}
SEGMENTS = 4  # of source and target in the grouped layout
LINE = "{dtype:9} {layout:8} {length:5} {kernel:6} {ms:10.2f} ms  x{ratio:.2f}"
CLOSE = 0.02  # relative difference that 16 bits may make


def packed_row(layout: str, length: int, count: int, device):
    """A row of `count` sequences of `length` tokens."""
    from rollouts.layout import grouped
    from trainers.core.packed_row import PackedRow

    bounds = [index * length for index in range(count + 1)]
    if layout == "causal":
        return PackedRow(bounds, None, device)
    part = length // (2 * SEGMENTS)
    return PackedRow(bounds, [grouped([part] * SEGMENTS, [part] * SEGMENTS)] * count, device)


def ways(row, dtype) -> dict[str, Callable]:
    """The kernels that run there, by name: functions of query, key and value."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

    from rollouts.layout import additive
    from trainers.core import attention_kernels

    module = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, training=False)
    dense = row.dense()[None, None]
    mask = additive(dense, dtype)

    def sdpa(query, key, value):
        key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    def eager(query, key, value):
        return eager_attention_forward(module, query, key, value, mask, scaling=WIDTH**-0.5)[0]

    names, cuda = ["each"], row.device.type == "cuda"
    sixteen_bits = dtype in attention_kernels.SIXTEEN_BITS
    if cuda and sixteen_bits:
        names.append("flex")
    if cuda and sixteen_bits and not row.layouts and attention_kernels.runs_flash(row.device):
        names.append("flash")

    def packed(name: str) -> Callable:
        return lambda *states: attention_kernels.KERNELS[name](*states, row, **OPTIONS)

    torch.manual_seed(0)
    return {name: packed(name) for name in names} | {"sdpa": sdpa, "eager": eager}


def compare(layout: str, length: int, tokens: int, dtype, device, rounds: int) -> list[dict]:
    """Milliseconds of each way, forward and backward, and its ratio to `each`.

    Raises:
        SystemExit: a way computes something else than eager.
    """
    import torch

    row = packed_row(layout, length, tokens // length, device)
    shapes = [(1, heads, row.bounds[-1], WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    states = [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]
    found = ways(row, dtype)
    outputs = {name: way(*states).detach().float() for name, way in found.items()}
    for name, output in outputs.items():
        error = float((output - outputs["eager"]).norm() / outputs["eager"].norm())
        if not error < CLOSE:
            sys.exit(f"{name} differs from eager by {error:.3g} ({layout}, {length} tokens)")
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds + 1):  # the first one warms up
        for name, way in found.items():
            times[name].append(seconds(way, states, device.type == "cuda"))
    medians = {name: 1000 * statistics.median(measured[1:]) for name, measured in times.items()}
    shape = {"layout": layout, "length": length, "tokens": row.bounds[-1], "dtype": str(dtype)[6:]}
    return [
        shape | {"kernel": name, "ms": round(ms, 3), "ratio": round(ms / medians["each"], 3)}
        for name, ms in medians.items()
    ]


def seconds(way: Callable, states: list, cuda: bool) -> float:
    """One forward and backward pass."""
    import torch

    for tensor in states:
        tensor.grad = None
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    way(*states).float().square().sum().backward()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--tokens", type=int, default=8192)
    add("--lengths", type=int, nargs="+", default=[64, 512, 4096])
    add("--dtypes", nargs="+", default=["float32", "bfloat16"])
    add("--rounds", type=int, default=5)
    add("--out", type=Path, help="a JSON file for the rows")
    args = parser.parse_args(arguments)
    import torch

    rows = []
    for dtype in args.dtypes:
        for layout in ("causal", "grouped"):
            for length in args.lengths:
                measured = compare(
                    *(layout, length, args.tokens, getattr(torch, dtype)),
                    *(torch.device(args.device), args.rounds),
                )
                rows += measured
                for row in measured:
                    print(LINE.format(**row), flush=True)
                if args.out is not None:
                    args.out.write_text(json.dumps(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
