"""The run: shapes, then rows.

A row is the correctness gate, the timings, the memory and the lines.
"""

import itertools
import time
from dataclasses import dataclass

import torch

from benchmarks.kernels.measure import Accuracy, Clock, accuracy, ceilings, interleave, quantile
from benchmarks.kernels.memory import MemoryProbe, available_bytes
from benchmarks.kernels.oracle import Truth, truth_of
from benchmarks.kernels.peers import Peer, one_line
from benchmarks.kernels.problem import Point, Problem
from benchmarks.kernels.report import Report
from benchmarks.kernels.rows import ROWS, Provider, Row

SKIPPED = {"status": "skipped", "reason": "time"}


@dataclass(frozen=True)
class Plan:
    """What to run. `rounds` None: as many as fit into `row_seconds`, between 3 and 50."""

    device: str
    suites: tuple[str, ...]
    tokens: list[int]
    reward_tokens: list[int]
    hidden: list[int]
    vocab: list[int]
    dtypes: list[str]
    mask: float
    rounds: int | None
    row_seconds: float
    small: bool


class Runner:
    """Runs a plan until a deadline of time.perf_counter.

    What comes too late is reported as skipped.
    """

    def __init__(
        self,
        plan: Plan,
        peers: dict[str, Peer],
        report: Report,
        deadline: float,
        memory: MemoryProbe | None,
    ) -> None:
        self.plan, self.peers, self.report, self.memory = plan, peers, report, memory
        self.deadline = deadline
        self.clock = Clock(plan.device)
        self.truths: dict[tuple[Point, str], Truth] = {}
        # Memory for which there was no time in its turn.
        self.late: list[tuple[dict, tuple[int, str, Point]]] = []

    def in_time(self) -> bool:
        return time.perf_counter() < self.deadline

    def run(self) -> None:
        plan = self.plan
        if "reward" in plan.suites:  # token-wise, in float32 whatever the head's dtype
            self.measure_ceilings("fp32")
            for T in plan.reward_tokens:
                self.shape(Point(plan.device, "fp32", T, 1, 2), ("T",))
        for dtype in plan.dtypes if plan.suites != ("reward",) else ():
            self.measure_ceilings(dtype)
            for V, T, H in itertools.product(plan.vocab, plan.tokens, plan.hidden):
                # Rows from logits do not depend on H.
                with_logits = plan.hidden.index(H) == 0
                letters = ("THV", "TV") if with_logits else ("THV",)
                self.shape(Point(plan.device, dtype, T, H, V), letters)
        for record, args in self.late:
            self.report.add(record, self.peak_memory(*args))

    def peak_memory(self, row: int, provider: str, point: Point) -> dict[str, float | str]:
        left = min(120, self.deadline - time.perf_counter())
        if left <= 0:
            return {"memory_reason": "skipped (time)"}
        return self.memory.measure(row, provider, point, left)

    def measure_ceilings(self, dtype: str) -> None:
        self.ceilings = ceilings(self.clock, dtype, self.plan.small)
        copy, gemm = self.ceilings
        self.report.write("ceilings", dtype=dtype, copy_gbs=copy, gemm_tflops=gemm)
        print(f"ceilings {dtype}: copy {copy:.4g} GB/s, GEMM {gemm:.4g} TF/s", flush=True)

    def shape(self, point: Point, letters: tuple[str, ...]) -> None:
        """The rows of those letters at one shape, on the same inputs."""
        problem = Problem(point)
        self.truths.clear()
        for i, row in enumerate(ROWS):
            if row.suite in self.plan.suites and row.letters in letters:
                self.row(i, row, problem)
                if row.masked and self.plan.mask:
                    self.row(i, row, problem.masked(self.plan.mask))

    def row(self, index: int, row: Row, p: Problem) -> None:
        # Else shapes run into the recompilation limit and fall back to eager unseen.
        torch.compiler.reset()
        ready: list[tuple[Provider, Accuracy]] = []
        absent: list[dict] = []
        for provider in row.providers(self.peers):
            passed = self.gate(row, p, provider)
            if isinstance(passed, Accuracy):
                ready.append((provider, passed))
            else:
                absent.append({"provider": provider.name, **passed})
        providers = [provider for provider, _ in ready]
        times, broken = interleave(self.clock, p, providers, self.rounds, self.in_time)
        about = _about(row, p)
        for provider, error in ready:
            name = provider.name
            if name in times:
                record = {**about, "provider": name, "status": "ok"}
                record |= self.figures(row, p, times[name]) | _errors(error)
                record |= _ratio(times[name], times.get("ours"))
                self.add_memory(record, index, row, p)
                self.report.result(record)
            else:
                why = _absent(one_line(broken[name])) if name in broken else SKIPPED
                absent.append({"provider": name, **why})
        for record in absent:
            self.report.result(about | record)

    def add_memory(self, record: dict, index: int, row: Row, p: Problem) -> None:
        """Into the record, now or after everything else."""
        if self.memory is None or not row.copies:
            return
        args = index, record["provider"], p.point
        if self.memory.affordable():
            record |= self.peak_memory(*args)
        else:
            self.late.append((record, args))

    def rounds(self, first_ms: float) -> int:
        return self.plan.rounds or min(50, max(3, round(self.plan.row_seconds * 1e3 / first_ms)))

    def gate(self, row: Row, p: Problem, provider: Provider) -> Accuracy | dict[str, object]:
        """The provider's accuracy on its first call, or why it takes no part."""
        if provider.call is None:
            return _absent(provider.reason)
        if not self.in_time():
            return SKIPPED
        need = row.copies * 4.0 * p.T * p.V
        if provider.full_logits and need > 0.8 * available_bytes(self.plan.device):
            return _absent(f"needs about {need / 2**30:.0f} GiB")
        key = p.point, row.truth
        try:
            if key not in self.truths:
                self.truths[key] = truth_of(p, row.truth)
            if provider.prepare is not None:
                provider.prepare(p)
            error = accuracy(p, provider.call(p), self.truths[key])
        # Out of memory, an unsupported shape, no compiler: not the run's end.
        except Exception as cause:
            return _absent(one_line(cause))
        passed = error.within(p.point.dtype, 2 if row.suite == "kl" else 1)
        return error if passed else {"status": "failed", **_errors(error)}

    def figures(self, row: Row, p: Problem, times: list[float]) -> dict[str, object]:
        p50 = quantile(times, 0.5)
        flops, traffic = row.flops(p), row.traffic(p)
        floor = self.ceilings.floor_ms(flops, traffic)
        return {
            "ms_p50": p50,
            "ms_p20": quantile(times, 0.2),
            "ms_p80": quantile(times, 0.8),
            "rounds": len(times),
            "tflops": flops / p50 * 1e-9 if flops else None,
            "gbs": traffic / p50 * 1e-6,
            "floor_ms": floor,
            "percent_of_floor": 100 * floor / p50,
        }


def _about(row: Row, p: Problem) -> dict[str, object]:
    """What every record of a row says; a size that does not matter to it is None."""
    sizes = {"T": p.T, "H": p.H, "V": p.V}
    return {
        "kernel": row.kernel,
        "mode": row.mode,
        "shape": p.point.label(row.letters),
        **{letter: size if letter in row.letters else None for letter, size in sizes.items()},
        "dtype": p.point.dtype,
        "mask": p.point.mask,
    }


def _ratio(times: list[float], ours: list[float] | None) -> dict[str, float]:
    """The median over rounds of a provider's time over ours."""
    if ours is None:
        return {}
    return {"ratio": quantile([x / y for x, y in zip(times, ours)], 0.5)}


def _absent(reason: str) -> dict[str, str]:
    return {"status": "n/a", "reason": reason}


def _errors(error: Accuracy) -> dict[str, float]:
    return {"error_max": error.worst, "error_p99": error.p99, "error_grad": error.grad}
