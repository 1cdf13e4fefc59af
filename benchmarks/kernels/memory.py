"""Peak memory of one call, in a process of its own."""

import ctypes
import gc
import multiprocessing
import re
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.kernels.peers import PEERS, load_peer, one_line
from benchmarks.kernels.problem import Point, Problem
from benchmarks.kernels.rows import ROWS, Outcome

MIB = 2**20


class MemoryProbe:
    """Starts the processes. They may take `share` of the time so far, so that timings are not
    starved of it."""

    def __init__(self, folder: Path, share: float) -> None:
        self.folder, self.share = folder, share
        self.started, self.spent = time.perf_counter(), 0.0
        self.context = multiprocessing.get_context("forkserver")
        # imported once, before any device is touched
        self.context.set_forkserver_preload(["torch"])

    def affordable(self) -> bool:
        return self.spent <= self.share * (time.perf_counter() - self.started)

    def measure(
        self, row: int, provider: str, point: Point, timeout: float
    ) -> dict[str, float | str]:
        """temp_mib (peak above inputs, gradients apart) and grads_mib, or a `memory_reason`;
        timeout in seconds."""
        if point.device == "cuda":
            torch.cuda.empty_cache()
        started = time.perf_counter()
        here, there = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=_child, args=(there, row, provider, point, self.folder), daemon=True
        )
        process.start()
        there.close()
        try:
            return here.recv() if here.poll(timeout) else {"memory_reason": "skipped (time)"}
        except EOFError:
            return {"memory_reason": "the process died"}
        finally:
            process.kill()
            process.join()
            self.spent += time.perf_counter() - started


def _child(out: Connection, row: int, provider: str, point: Point, folder: Path) -> None:
    try:
        out.send(_measure(row, provider, point, folder))
    except Exception as error:  # sent on: a lost process would be a worse report
        out.send({"memory_reason": one_line(error)})


def _measure(row: int, name: str, point: Point, folder: Path) -> dict[str, float | str]:
    peers = {name: load_peer(name, point.device, folder, install=False)} if name in PEERS else {}
    provider = next(x for x in ROWS[row].providers(peers) if x.name == name)
    p = Problem(point)

    def call() -> Outcome:
        if provider.prepare is not None:
            provider.prepare(p)
        return provider.call(p)

    call()  # makes the inputs, compiles
    gc.collect()
    inputs = _storages(
        x for value in vars(p).values() for x in (value if isinstance(value, tuple) else (value,))
    )
    before = start_watch(point.device, sum(inputs.values()))
    outcome = call()
    peak = peak_bytes(point.device) - before
    grads = sum(size for at, size in _storages(outcome.grads).items() if at not in inputs)
    return {"temp_mib": max(0, peak - grads) / MIB, "grads_mib": grads / MIB}


def _storages(values) -> dict[int, int]:
    """Bytes by address."""
    found = [x.untyped_storage() for x in values if isinstance(x, torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def start_watch(device: str, inputs: int) -> int:
    """Begin to watch; returns the bytes that the call is not charged with."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return inputs  # what a library keeps from its first call on counts
    ctypes.CDLL(None).malloc_trim(0)  # else freed pages would hide what the call needs
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024


def available_bytes(device: str) -> float:
    """Room for a call on the CPU, where running out of memory kills; a GPU says so in time."""
    found = (
        None
        if device == "cuda"
        else re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    )
    return int(found.group(1)) * 1024 if found else float("inf")
