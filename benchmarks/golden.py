"""Golden curves: every recipe, run briefly, gives the numbers that it gave before. A refactor
proves itself with them.

    python -m benchmarks.golden record [NAME …]     run, and write tests/golden/NAME.json
    python -m benchmarks.golden check [NAME …]      run, and compare

Each run takes a few steps of small batches on the embedded models, on one CPU thread with one rank
and a fixed seed. Its file holds the rows of metrics.jsonl without times and memory, a checksum of
the final weights, and the curves of the decision heads where it sweeps them.
tests/golden/machine.json names the processor and the versions that the files
were recorded with. There the check demands equality, to the byte. On another machine float32 sums
round otherwise, and a sampled token may flip, after which two runs go apart. So elsewhere the check
compares the first evaluation and the first step, within `BOUNDS`."""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
COMMON = {
    "train.steps": 3,
    "train.prompts_per_step": 8,
    "train.tokens_per_microbatch": 600,
    "checkpoint.every": 0,
    "data.stories": 96,
    "data.max_prompt_tokens": 512,
    "rollout.engine": "hf",
    "rollout.max_new_tokens": 40,
    "eval.size": 8,
    "eval.k": 2,
    "eval.every": 2,
    "log.wandb": "disabled",
}
SAMPLED = {"rollout.samples_per_prompt": 4}
STREAMED = {"rollout.engine": "streaming", "streaming.seconds_per_token": 0.01}
TRANSLATED = {
    "rollout.engine": "simultaneous",
    "eval.k": 1,
    "proactive.calibration_size": 12,
    "data.path": "translation",
    "proactive.curve": "[batch,wait_k]",
}
STUDENT = {
    "model.path": "stories-student",
    "model.dtype": "float32",
    "data.path": "stories",
    "data.split": "train",
    "eval.path": "stories",
    "eval.split": "heldout",
    "eval.max_new_tokens": "null",
    "train.lr": 1e-3,
}
TAUGHT = STUDENT | {"teacher.path": "stories-teacher", "teacher.dtype": "float32"}
UNTRAINED = {
    "model.path": "translation-untrained",
    "data.prompt_column": "null",
    "data.target_column": "null",
    "data.template": "plain",
    "eval.path": "translation",
    "eval.split": "heldout",
    "proactive.calibration_path": "translation",
}
FRAMES = {
    "model.path": "translation-untrained",
    "model.encoder": "benchmarks.golden.encoder",
    "data.path": "FRAMES",
    "data.template": "plain",
    "eval.path": "FRAMES",
    "eval.split": "train",
}
# Of each run: its recipe, where that is not its name, and the overrides beside `COMMON`.
RUNS: dict[str, dict] = {
    "poweropd": {},
    "poweropd_vllm": {"recipe": "poweropd", "rollout.engine": "vllm"},
    "poweropd_resumed": {"recipe": "poweropd", "checkpoint.every": 2, "stop_at": 2},
    "poweropd_full": {},
    "poweropd_paper": TAUGHT,
    "poweropd_lora": TAUGHT,
    "poweropd_task": SAMPLED | {"recipe": "poweropd", "reward.task_weight": 0.5},
    "poweropd_teachers": {
        "recipe": "poweropd",
        "teachers.first.path": "stories-teacher",
        "teachers.second.path": "self",
        "teachers.second.weight": 0.5,
    },
    "poweropd_own_tokens": {
        "recipe": "poweropd",
        "teacher.path": "translation-untrained",
        "teacher.tokenizer": "own",
        "reward.token": "log_ratio",
    },
    "opd": {},
    "opd_clip": {},
    "opd_tanh": {},
    "opd_zscore": {},
    "opd_tv": {},
    "dial_opd": {},
    "opsd": {},
    "opd_forward_kl": {},
    "opd_jsd": {},
    "opd_reverse_kl": {},
    "opd_topk": {},
    "grpo": SAMPLED,
    "onpolicy_sft": SAMPLED,
    "onpolicy_sft_paper": STUDENT
    | SAMPLED
    | {
        "rollout.engine": "vllm",
        "model.path": "stories-verbose",
        "data.difficulty": 1,
        "rollout.max_new_tokens": 60,
        "data.suffix": "null",
    },
    "sft": {},
    "distill": {"teacher.cache": "CACHE"},
    "streaming_sft": STREAMED | {"model.path": "stories-student"},
    "adasr": STREAMED | SAMPLED,
    "adasr_grpo": STREAMED | SAMPLED,
    "adasr_paper": STREAMED
    | SAMPLED
    | STUDENT
    | {"model.path": "stories-streaming", "rollout.engine": "vllm"},
    "proactivellm": TRANSLATED,
    "proactivellm_paper": TRANSLATED | UNTRAINED | {"train.lr": 1e-3, "model.dtype": "float32"},
    "proactivellm_speech": TRANSLATED | FRAMES | {"train.lr": 1e-3, "model.dtype": "float32"},
}
# The environment of a run: one thread of a CPU.
ALONE = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
FAST = ("poweropd", "grpo", "adasr", "proactivellm")
# Relative differences that another processor may make, in the first evaluation and the first step.
BOUNDS = {"eval": 0.35, "step": 0.05}


def encoder():
    """A causal encoder of one frame per embedding, with fixed weights, for `model.encoder`."""
    import torch

    class Projection(torch.nn.Module):
        width, stride, rate = 5, 1, 10.0

        def __init__(self):
            super().__init__()
            weights = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
            self.weights = torch.nn.Parameter(0.05 * weights)

        def forward(self, frames):
            """[F, 5] -> [F, 128]."""
            return frames @ self.weights

    return Projection()


def write_frames(path: Path) -> None:
    """Twenty sources of 6 to 25 frames of five numbers, with texts."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "audio": rng.normal(size=(6 + index, 5)).round(3).tolist(),
            "text": "rarin lalun laxan"[: 5 + 6 * (index % 3)],
        }
        for index in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_inputs(keys: dict, stem: Path, core: int | None = None) -> dict:
    """The keys, with what is made for them in place of `FRAMES` and `CACHE`: STEM.jsonl, and the
    folder STEM.cache."""
    frames, cache = stem.with_suffix(".jsonl"), stem.with_suffix(".cache")
    values = keys.values()
    if "FRAMES" in values:
        write_frames(frames)
    if "CACHE" in values:
        data = [f"{key}={keys[key]}" for key in ("data.stories", "data.max_prompt_tokens")]
        models = ["model=stories-student", "teacher=stories-teacher", "data=stories"]
        words = ["-m", "scripts.cache_teacher", *models, f"out={cache}", "shard_rows=40", *data]
        python(words, "the cache", core)
    paths = {"FRAMES": frames, "CACHE": cache}
    return {key: paths.get(value, value) for key, value in keys.items()}


def machine() -> dict[str, str]:
    """What decides how sums round: the processor and the libraries."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (
                line.split(":", 1)[1].strip()
                for line in info.read_text().splitlines()
                if line.startswith("model name")
            ),
            cpu,
        )
    packages = ("torch", "transformers", "deepspeed")
    return {"cpu": cpu} | {name: importlib.metadata.version(name) for name in packages}


def run(name: str, folder: Path, core: int | None) -> dict:
    """One run of `RUNS`; returns what its file holds. Raises SystemExit: it failed."""
    keys = {"recipe": name} | COMMON | RUNS[name] | {"run.dir": folder}
    stop_at = keys.pop("stop_at", None)
    overrides = [f"{key}={value}" for key, value in with_inputs(keys, folder, core).items()]
    if stop_at:
        train([*overrides, f"train.steps={stop_at}"], name, core)
        overrides.append("resume=auto")
    train(overrides, name, core)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}
        for row in rows
    ]
    weights = folder / "checkpoints" / f"step_{keys['train.steps']}" / "model" / "model.safetensors"
    result = {"rows": kept, "weights": checksum(weights)}
    curves = folder / "curves.json"
    if curves.exists():
        result["curves"] = json.loads(curves.read_text())["policies"]
    return result


def train(overrides: list[str], name: str, core: int | None) -> None:
    """`train.py`, as `python`."""
    python(["train.py", *overrides], name, core)


def python(words: list[str], name: str, core: int | None) -> None:
    """`python WORDS …`, on one thread. Raises SystemExit: it failed."""
    command = [sys.executable, *words]
    pin = (lambda: os.sched_setaffinity(0, {core})) if core is not None else None
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ALONE, capture_output=True, text=True, preexec_fn=pin
    )
    if done.returncode:
        raise SystemExit(f"{name} failed: {' '.join(command)}\n{done.stderr[-3000:]}")


def checksum(weights: Path) -> str:
    """Of the tensors by name, not of the file: its header may be in another order."""
    from safetensors.numpy import load_file

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(load_file(weights).items()):
        digest.update(name.encode() + str(tensor.dtype).encode() + tensor.tobytes())
    return digest.hexdigest()


def differences(wanted: dict, found: dict) -> list[str]:
    """Where two files differ, in words; nothing where they are equal."""
    lines = []
    for row, (old, new) in enumerate(zip(wanted["rows"], found["rows"], strict=False)):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                lines.append(
                    f"row {row} (step {old['step']}): {key} {old.get(key)} -> {new.get(key)}"
                )
    if len(wanted["rows"]) != len(found["rows"]):
        lines.append(f"{len(wanted['rows'])} rows -> {len(found['rows'])}")
    if wanted["weights"] != found["weights"]:
        lines.append("the final weights differ")
    if wanted.get("curves") != found.get("curves"):
        lines.append("the decision heads' curves differ")
    return lines


def out_of_bounds(wanted: dict, found: dict) -> list[str]:
    """The metrics of the first evaluation and of step 1 that are further apart than `BOUNDS`, in
    words."""
    lines = []
    if len(wanted["rows"]) != len(found["rows"]):
        lines.append(f"{len(wanted['rows'])} rows -> {len(found['rows'])}")
    for old, new in zip(wanted["rows"][:2], found["rows"][:2]):
        bound = BOUNDS["step" if "train/loss" in old else "eval"]
        if old.keys() != new.keys():
            lines.append(f"step {old['step']}: other metrics, {sorted(old.keys() ^ new.keys())}")
        for key in old.keys() & new.keys():
            a, b = old[key], new[key]
            if isinstance(a, (int, float)) and not math.isclose(
                a, b, rel_tol=bound, abs_tol=bound / 10
            ):
                lines.append(f"step {old['step']}: {key} {a} -> {b}, more than {bound:.0%}")
    return lines


def main() -> int:
    """Returns 1 where a comparison fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["record", "check"])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"of {', '.join(RUNS)}; `fast`: {', '.join(FAST)}",
    )
    parser.add_argument(
        "--within-bounds", action="store_true", help="compare as on another machine"
    )
    arguments = parser.parse_args()
    names = list(FAST) if arguments.names == ["fast"] else arguments.names or list(RUNS)
    if unknown := set(names) - RUNS.keys():
        parser.error(f"no such run: {', '.join(sorted(unknown))}")
    recorded, here = GOLDEN / "machine.json", machine()
    same = recorded.exists() and json.loads(recorded.read_text()) == here
    if arguments.action == "record":
        if not same and set(names) != RUNS.keys():
            parser.error("another machine recorded the other files; record all of them")
        GOLDEN.mkdir(exist_ok=True)
        recorded.write_text(json.dumps(here, indent=1) + "\n")
    exact = same and not arguments.within_bounds
    if arguments.action == "check" and not exact:
        print("another machine or other versions than the recorded ones: compared within bounds")
    started, failed = time.monotonic(), 0
    for name, found in results(names):
        path = GOLDEN / f"{name}.json"
        if arguments.action == "record":
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}: recorded, {len(found['rows'])} rows", flush=True)
        else:
            failed += not report(name, json.loads(path.read_text()), found, exact)
    print(f"{len(names)} runs, {failed} differ, {time.monotonic() - started:.0f} s")
    return int(failed > 0)


def results(names: list[str]) -> Iterator[tuple[str, dict]]:
    """Each run's name and result, in order; as many run side by side as there are cores."""
    free = sorted(os.sched_getaffinity(0))

    def one(name: str) -> dict:
        core = free.pop()
        try:
            return run(name, Path(temporary) / name, core)
        finally:
            free.append(core)

    with (
        tempfile.TemporaryDirectory() as temporary,
        concurrent.futures.ThreadPoolExecutor(len(free)) as pool,
    ):
        yield from zip(names, pool.map(one, names))


def report(name: str, wanted: dict, found: dict, exact: bool) -> bool:
    """Print how a run compares; whether it is as it should be."""
    lines = differences(wanted, found) if exact else out_of_bounds(wanted, found)
    if lines:
        print("\n  ".join([f"{name}: DIFFERS", *lines[:12]]), flush=True)
    else:
        print(f"{name}: {'equal' if exact else 'within bounds'}", flush=True)
    return not lines


if __name__ == "__main__":
    sys.exit(main())
