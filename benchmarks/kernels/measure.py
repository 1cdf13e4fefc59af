"""Times, errors and measured ceilings."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.kernels.oracle import Truth
from benchmarks.kernels.problem import DTYPES, Problem
from benchmarks.kernels.rows import Outcome, Provider

# (nats per model, relative L2 of a gradient) by dtype; 0.15 nats is about what bfloat16 logits near
# 20 cost.
TOLERANCE = {"fp32": (1e-3, 1e-3), "bf16": (0.15, 5e-2), "fp16": (0.15, 5e-2)}


class Accuracy(NamedTuple):
    """Errors against the oracle.

    worst and p99 are over tokens, in nats; grad is the worst gradient's relative L2, if any.
    """

    worst: float
    p99: float
    grad: float | None

    def within(self, dtype: str, models: int) -> bool:
        """`models`: how many models' log-probs the values are made of."""
        nats, grad = TOLERANCE[dtype]
        # Both comparisons are false for NaN.
        return self.worst <= models * nats and (self.grad is None or self.grad <= grad)


class Ceilings(NamedTuple):
    """What the device reaches here.

    copy: GB/s of a large copy. gemm: TF/s of a large GEMM in the run's dtype.
    """

    copy: float
    gemm: float

    def floor_ms(self, flops: float, traffic: float) -> float:
        return flops / self.gemm * 1e-9 + traffic / self.copy * 1e-6


class Clock:
    """Milliseconds of one call: CUDA events after a flush of the L2 cache, else the wall clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            # Large enough that the host has queued the call's launches before the flush is over.
            size = max(4 * cache, 2**29)
            self.flush = torch.empty(size, dtype=torch.uint8, device=device)

    def time(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def best(self, call: Callable[[], object], repeats: int) -> float:
        """The median of some repeats after a warm-up."""
        call()
        return quantile([self.time(call) for _ in range(repeats)], 0.5)


def quantile(samples: list[float], q: float) -> float:
    return torch.tensor(samples, dtype=torch.float64).quantile(q).item()


# Bytes of the copy, and (m, k, n) of the GEMM.
_CEILING_SIZES = {
    "small": (2**26, (512, 512, 1024)),
    "cpu": (2**28, (1024, 512, 4096)),
    "cuda": (2**31, (8192, 4096, 16384)),
}


def ceilings(clock: Clock, dtype: str, small: bool) -> Ceilings:
    device = "cuda" if clock.cuda else "cpu"
    size, (m, k, n) = _CEILING_SIZES["small" if small else device]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / clock.best(lambda: target.copy_(source), 7) * 1e-6
    a = torch.randn(m, k, device=device).to(DTYPES[dtype])
    b = torch.randn(n, k, device=device).to(DTYPES[dtype])
    return Ceilings(copy, 2.0 * m * k * n / clock.best(lambda: a @ b.t(), 7) * 1e-9)


def accuracy(p: Problem, outcome: Outcome, truth: Truth) -> Accuracy:
    if outcome.values is not None:
        errors = (outcome.values.detach().double() - truth.values).abs()
        errors = errors if p.mask is None else errors[p.mask]
    elif outcome.loss is not None:
        errors = (outcome.loss.double() - truth.loss).abs().reshape(1)
    else:
        errors = torch.zeros(1)
    worst = p99 = float("nan")
    if not errors.isnan().any():
        worst, p99 = errors.max().item(), errors.quantile(0.99).item()
    # A forward has no gradients. NaN is looked for by name: max() passes it over.
    grads = [
        ((got[at].double() - want).norm() / want.norm()).item()
        for got, (at, want) in zip(outcome.grads, truth.grads)
    ]
    grad = max(grads, key=lambda g: float("inf") if math.isnan(g) else g, default=None)
    return Accuracy(worst, p99, grad)


def interleave(
    clock: Clock,
    p: Problem,
    providers: list[Provider],
    rounds: Callable[[float], int],
    more: Callable[[], bool],
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Milliseconds per provider and round, and the errors of those that dropped out.

    Each provider is called once a round, in turn. `rounds` says how many rounds there are from the
    milliseconds of the first; none begins where `more` is false.
    """
    times: dict[str, list[float]] = {}
    failed: dict[str, Exception] = {}
    alive, i, count = list(providers), 0, 1
    while alive and i < count and more():
        # Nobody always follows the same one.
        first = i % len(alive)
        for provider in alive[first:] + alive[:first]:
            try:
                if provider.prepare is not None:
                    provider.prepare(p)
                elapsed = clock.time(partial(provider.call, p))
                times.setdefault(provider.name, []).append(elapsed)
            except Exception as error:
                # As in the gate; memory may run out only now.
                failed[provider.name] = error
                times.pop(provider.name, None)
        alive = [provider for provider in alive if provider.name not in failed]
        count = rounds(sum(samples[0] for samples in times.values())) if i == 0 else count
        i += 1
    return times, failed
