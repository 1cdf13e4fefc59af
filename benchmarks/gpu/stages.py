"""The stages of benchmarks/gpu.sh. Each runs in processes of its own, which may die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "triton", "transformers", "peft", "accelerate", "deepspeed", "hydra-core"),
    *("vllm", "wandb", "trl", "liger-kernel", "flash-attn", "pytest", "numpy"),
)
# Asked of the Python that runs the stages, with the packages that they see.
DESCRIPTION = """
import importlib.metadata, json, platform, sys
import torch
from benchmarks.kernels.report import environment
found = environment(sys.argv[1], [])
versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
for name in sys.argv[2:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = None
if sys.argv[1] == "cuda":
    about = torch.cuda.get_device_properties(0)
    found["memory_gib"] = round(about.total_memory / 2**30, 1)
    found["capability"] = [about.major, about.minor]
keys = ("device", "memory_gib", "capability", "cores", "threads", "gpu", "git_sha", "backend")
print(json.dumps({key: found[key] for key in keys if key in found} | {"versions": versions}))
"""
METHODS = (
    *("vanilla", "power", "power_full_vocabulary", "power_lora", "power_sdpa"),
    *("power_torch_kernels", "streaming", "profile"),
)
KERNELS = {
    True: "--tokens 24 --hidden 16 --vocab 300 --dtype fp32 --suite kl --quick --no-memory",
    False: "--tokens 8192 --hidden 2048 --vocab 151936 --dtype bf16 --suite all",
}


# Seconds that a process gets to end by itself before it is killed.
ENDING = 15
# The status of a worker that wants to go on in a new process.
AGAIN = 75


@dataclass(frozen=True)
class Job:
    """What a stage is given: device, size, seconds, a folder, and its processes' variables."""

    device: str
    quick: bool
    seconds: float
    work: Path
    environment: dict[str, str]


def describe(device: str, environment: dict[str, str]) -> dict:
    """The device, the commit and the versions. Whatever goes wrong is told as the device."""
    try:
        done = start(["-c", DESCRIPTION, device, *PACKAGES], 120, environment)
        return json.loads(done.stdout.splitlines()[-1])
    except (RuntimeError, IndexError, ValueError) as error:
        return {"device": f"unknown: {last_lines(str(error))}"}


def run_triton_tests(job: Job) -> dict:
    """The tests of the Triton kernels."""
    return run_tests(job, "tests/kernels/test_triton_gpu.py", "cuda_graph" if job.quick else "")


def run_attention_tests(job: Job) -> dict:
    """The tests of packed attention that are of a GPU, and of the choice of its kernel."""
    choice = "choose_the_kernel" if job.quick else "cuda or choose_the_kernel"
    return run_tests(job, "tests/trainers/test_attention.py", choice)


def run_tests(job: Job, file: str, choice: str) -> dict:
    """How many of a file's tests passed, and which failed how. They run in order of the file."""
    report = job.work / f"{Path(file).stem}.xml"
    options = ["-vv", "-p", "no:cacheprovider", f"--junitxml={report}", "-k", choice]
    # pytest ends by itself, so that what has passed until then is in the report.
    options.append(f"--session-timeout={max(job.seconds - ENDING, 1):.0f}")
    done = start(["-m", "pytest", file, *options], job.seconds, job.environment, fails=True)
    if not report.exists():
        raise RuntimeError(last_lines(done.stdout + done.stderr))
    counts, failed = Counter(), {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag: child for child in case}
        kind = next((k for k in ("failure", "error", "skipped") if k in kinds), "passed")
        counts[kind] += 1
        if kind in ("failure", "error"):
            failed[case.get("name")] = last_lines(kinds[kind].get("message", ""))
    found = {"counts": dict(counts), "failed": failed}
    if done.returncode:
        found |= {"status": "failed", "reason": last_lines(done.stdout, 300)}
    return found


def run_kernels(job: Job) -> dict:
    """The kernels' bench: milliseconds, MiB and the ratio to naive torch, of each provider."""
    out = job.work / "kernels.jsonl"
    peers = (
        "torch" if job.quick else ",".join(["torch", "compile", "torch-lce", *other_kernels(job)])
    )
    arguments = ["--device", job.device, *KERNELS[job.quick].split(), "--peers", peers]
    # It keeps to its budget between rows; a row of its own may take a little longer.
    budget = ["--budget-s", str(max(job.seconds - 20, 5)), "--out", str(out)]
    failure = run_bench(["-m", "kernels.bench", *arguments, *budget], job, out)
    keys = ("kernel", "mask", "provider", "status", "reason", "ms_p50", "ratio", "temp_mib")
    records = [json.loads(line) for line in out.read_text().splitlines()]
    rows = [{k: r[k] for k in keys if k in r} for r in records if r["type"] == "result"]
    return {"peers": peers, "rows": rows} | failure


def run_bench(arguments: list[str], job: Job, out: Path) -> dict:
    """Run a bench that writes its file as it goes; returns why it failed, if it did.

    Raises:
        RuntimeError: it failed and wrote nothing.
    """
    try:
        done = start(arguments, job.seconds, job.environment, fails=True)
        if not done.returncode:
            return {}
        reason = last_lines(done.stdout + done.stderr)
    except RuntimeError as error:
        reason = str(error)
    if not out.exists():
        raise RuntimeError(reason)
    return {"status": "failed", "reason": reason}


def other_kernels(job: Job) -> list[str]:
    """The projects whose kernels are installed here; the bench would try to fetch the others."""
    code = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
    names = {"trl": "trl", "liger_kernel": "liger"}
    found = start(["-c", code, *names], 60, job.environment).stdout.split()
    return [names[name] for name in found]


def run_attention(job: Job) -> dict:
    """Packed attention of 8,192 tokens in sequences of three lengths, each kernel beside eager."""
    out = job.work / "attention.json"
    size = "--tokens 128 --lengths 32 --dtypes float32 --rounds 1" if job.quick else "--rounds 10"
    command = ["-m", "benchmarks.attention", "--device", job.device, *size.split()]
    failure = run_bench([*command, "--out", str(out)], job, out)
    return {"rows": json.loads(out.read_text())} | failure


def run_training(job: Job) -> dict:
    """Steps of each method: tokens per second, memory, seconds by phase; and a step's operators."""
    rows = train(job, METHODS, steps=2 if job.quick else 20)
    failed = [row["method"] for row in rows if "reason" in row]
    return {"rows": rows} | ({"status": "failed"} if failed else {})


def train(job: Job, methods: tuple[str, ...], steps: int) -> list[dict]:
    """Train with methods in turn, in one process. Where it dies, the next goes on in a new one."""
    out = job.work / f"training-{methods[0]}.jsonl"
    rows: list[dict] = []
    end = monotonic() + job.seconds
    while len(rows) < len(methods):
        left = [method for method in methods if method not in {row["method"] for row in rows}]
        if end - monotonic() < 5:
            return rows + [{"method": method, "reason": "no time was left"} for method in left]
        options = ["--device", job.device, "--steps", str(steps), "--work", str(job.work)]
        options += ["--out", str(out), *(["--quick"] if job.quick else [])]
        options += ["--seconds", str(max(end - monotonic() - ENDING, 1))]
        worker = ["-m", "benchmarks.gpu.training", *left, *options]
        again = False
        try:
            done = start(worker, end - monotonic(), job.environment, fails=True)
            said, again = last_lines(done.stdout + done.stderr), done.returncode == AGAIN
        except RuntimeError as error:
            said = last_lines(str(error))
        lines = out.read_text().splitlines() if out.exists() else []
        if not again and len(lines) < len(rows) + len(left):
            died = left[len(lines) - len(rows)]
            lines.append(json.dumps({"method": died, "reason": f"its process ended: {said}"}))
            out.write_text("\n".join(lines) + "\n")
        rows = [json.loads(line) for line in lines]
    return rows


def start(
    arguments: list[str], seconds: float, environment: dict[str, str], fails: bool = False
) -> subprocess.CompletedProcess:
    """Run Python with these arguments in the repository.

    Args:
        fails: a status that is not 0 is no error.

    Raises:
        RuntimeError: it failed, or was stopped after so many seconds.
    """
    variables = environment | {"PYTHONPATH": path_of(environment), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        # A group of its own, so that nothing it started outlives it on the GPU.
        files = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": errors}
        process = subprocess.Popen(command, cwd=ROOT, env=variables, process_group=0, **files)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = [text_of(file) for file in (out, errors)]
    if status is None:
        raise RuntimeError(f"stopped after {seconds:.0f} s: {last_lines(''.join(said))}")
    done = subprocess.CompletedProcess(command, status, *said)
    if done.returncode and not fails:
        raise RuntimeError(last_lines(done.stdout + done.stderr))
    return done


def text_of(file) -> str:
    """What a process has written to a file."""
    file.seek(0)
    return file.read().decode(errors="replace")


def path_of(environment: dict[str, str]) -> str:
    """PYTHONPATH with the repository first."""
    return os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))


def last_lines(text: str, most: int = 1500) -> str:
    """The end of what a process said."""
    return text.strip()[-most:]
