"""What is printed as it goes, the JSON lines, and the table at the end."""

import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import kernels
from benchmarks.kernels.peers import WHEELS

COLUMNS = (
    "kernel",
    "mode",
    "shape",
    "provider",
    "ms p50",
    "p20",
    "p80",
    "TF/s",
    "GB/s",
    "% floor",
    "temp MiB",
    "grads MiB",
    "err max (nats)",
    "grad rel",
    "ratio vs ours",
)


class Report:
    """Collects one record per (row, shape, provider)."""

    def __init__(self, out: Path | None) -> None:
        self.file = None if out is None else out.open("w")
        self.results: list[dict] = []

    def write(self, kind: str, **record: object) -> None:
        if self.file is not None:
            finite = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in record.items()
            }
            print(json.dumps({"type": kind, **finite}), file=self.file, flush=True)

    def result(self, record: dict) -> None:
        """Report one record; the fields are those of `cells`.

        status: ok, n/a, failed (the error is above tolerance) or skipped.
        """
        self.results.append(record)
        self.write("result", **record)
        kernel, mode, shape, provider, p50, p20, p80, tflops, gbs, floor, *_, err, grad, ratio = (
            cells(record)
        )
        line = f"{kernel} {mode} {shape} | {provider} {p50}"
        if record["status"] == "ok":
            line += f" ms [{p20} {p80}] | {tflops} TF/s | {gbs} GB/s | {floor} % of floor"
            line += f" | {_memory(record)}"
        if "error_max" in record:
            line += f" | err {err} | grad {grad}"
        print(line + (f" | {ratio}" if "ratio" in record else ""), flush=True)

    def add(self, record: dict, memory: dict) -> None:
        """Memory that was measured after the record was reported."""
        record |= memory
        self.write(
            "memory",
            **{key: record[key] for key in ("kernel", "mode", "shape", "provider")},
            **memory,
        )
        print("{kernel} {mode} {shape} | {provider}".format(**record), _memory(record), flush=True)

    def table(self) -> str:
        """Markdown; GitHub's kind."""
        rows = [COLUMNS, ["---"] * 4 + ["--:"] * 11, *map(cells, self.results)]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def cells(record: dict) -> list[str]:
    """One table row; what a record lacks is a dash."""

    def number(name: str, spec: str) -> str:
        return format(record[name], spec) if record.get(name) is not None else "-"

    status = record["status"]
    if status == "ok":
        time = number("ms_p50", ".4g")
    elif status == "failed":
        time = "error above tolerance"
    else:
        time = f"{status} ({record['reason']})"
    return [
        record["kernel"],
        record["mode"],
        record["shape"],
        record["provider"],
        time.replace("|", "/"),
        number("ms_p20", ".4g"),
        number("ms_p80", ".4g"),
        number("tflops", ".4g"),
        number("gbs", ".4g"),
        number("percent_of_floor", ".0f"),
        record.get("memory_reason") or number("temp_mib", ".1f"),
        number("grads_mib", ".1f"),
        number("error_max", ".1e"),
        number("error_grad", ".1e"),
        number("ratio", ".2f") + "x" * ("ratio" in record),
    ]


def _memory(record: dict) -> str:
    temp, grads = cells(record)[10:12]
    return f"temp {temp} + grads {grads} MiB"


def environment(device: str, peers: list[str]) -> dict[str, object]:
    """Hardware and versions; `None` where something does not exist."""
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": gpu_state() if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "peers": {name: WHEELS[name][1] for name in peers if name in WHEELS},
        "git_sha": _git_sha(),
        "backend": kernels.active_backend(device),
    }


def gpu_state() -> dict[str, str] | None:
    """Driver, clocks, temperature and power by nvidia-smi, where it exists."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    lines = done.stdout.strip().splitlines()
    return dict(zip(fields, lines[0].split(", "))) if done.returncode == 0 and lines else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_sha() -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else None
