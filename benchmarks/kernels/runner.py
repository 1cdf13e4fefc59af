"""The run: shapes, then rows; of a row the correctness gate, the timings, the memory and the
lines."""

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
    """Runs a plan until a deadline (of time.perf_counter); what comes too late is reported as
    skipped."""

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
        # memory for which there was no time in its turn
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
                letters = ("THV", "TV") if H == plan.hidden[0] else ("THV",)
                self.shape(Point(plan.device, dtype, T, H, V), letters)
        for record, args in self.late:
            self.report.add(record, self.peak_memory(*args))

    def peak_memory(self, row: int, provider: str, point: Point) -> dict[str, float | str]:
        left = min(120, self.deadline - time.perf_counter())
        return (
            self.memory.measure(row, provider, point, left)
            if left > 0
            else {"memory_reason": "skipped (time)"}
        )

    def measure_ceilings(self, dtype: str) -> None:
        self.ceilings = ceilings(self.clock, dtype, self.plan.small)
        self.report.write(
            "ceilings", dtype=dtype, copy_gbs=self.ceilings.copy, gemm_tflops=self.ceilings.gemm
        )
        print(
            f"ceilings {dtype}: copy {self.ceilings.copy:.4g} GB/s, GEMM {self.ceilings.gemm:.4g} TF/s",
            flush=True,
        )

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
        # else shapes run into the recompilation limit and fall back to eager unseen
        torch.compiler.reset()
        named = {
            "kernel": row.kernel,
            "mode": row.mode,
            "shape": p.point.label(row.letters),
            "T": p.T,
            "H": p.H if "H" in row.letters else None,
            "V": p.V if "V" in row.letters else None,
            "dtype": p.point.dtype,
            "mask": p.point.mask,
        }
        ready: list[tuple[Provider, Accuracy]] = []
        others = []
        for provider in row.providers(self.peers):
            passed = self.gate(row, p, provider)
            if isinstance(passed, Accuracy):
                ready.append((provider, passed))
            else:
                others.append({"provider": provider.name, **passed})
        times, broken = interleave(self.clock, p, [x for x, _ in ready], self.rounds, self.in_time)
        for provider, error in ready:
            if provider.name not in times:
                why = broken.get(provider.name)
                others.append(
                    {
                        "provider": provider.name,
                        **(SKIPPED if why is None else _absent(one_line(why))),
                    }
                )
                continue
            record = self.figures(row, p, times[provider.name]) | _errors(error)
            if "ours" in times:
                record["ratio"] = quantile(
                    [x / y for x, y in zip(times[provider.name], times["ours"])], 0.5
                )
            record = {**named, "provider": provider.name, "status": "ok", **record}
            if self.memory is not None and row.copies:
                late = (index, provider.name, p.point)
                if self.memory.affordable():
                    record |= self.peak_memory(*late)
                else:
                    self.late.append((record, late))
            self.report.result(record)
        for record in others:
            self.report.result(named | record)

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
        # out of memory, an unsupported shape, no compiler: not the run's end
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


def _absent(reason: str) -> dict[str, str]:
    return {"status": "n/a", "reason": reason}


def _errors(error: Accuracy) -> dict[str, float]:
    return {"error_max": error.worst, "error_p99": error.p99, "error_grad": error.grad}
