"""The process of benchmarks/gpu.sh that trains: methods in turn, a line of JSON for each.

The student and the teacher are a Qwen3 of 150M random weights each, two thirds of them the
embeddings of 151,936 tokens. The student never ends a text, so that every method has the same
tokens. They train in bfloat16 and sample with transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.stages import AGAIN

WARMUP = 2  # steps that compile and allocate, and do not count
OPERATORS = 25  # rows of the profile
# Of random models the probabilities are too small for the power 5.
POWER = ["recipe=poweropd", "reward.alpha=0.1"]
LORA = ["model.lora.rank=16", "model.lora.alpha=32"]
# Overrides of each method, beside those of `overrides`.
METHODS: dict[str, list[str]] = {
    "vanilla": ["recipe=opd"],
    "power": POWER,
    "power_full_vocabulary": ["recipe=poweropd_full", "reward.alpha=0.1"],
    "power_lora": [*POWER, *LORA],
    "power_sdpa": [*POWER, "model.attn_implementation=sdpa"],
    "power_torch_kernels": [*POWER, "kernels.backend=torch"],
    "streaming": ["recipe=streaming_sft", "streaming.layout=grouped"],
    "profile": POWER,
}
PROFILED = WARMUP + 1  # the last of so many steps


class OutOfTime(Exception):
    """A method has had its share of the time; what it has measured counts."""


def make_model(folder: Path, seed: int, quick: bool) -> None:
    """Write a model with random weights, and its tokenizer, which has a token for each row."""
    import torch
    from transformers import Qwen3ForCausalLM

    from benchmarks.vs_trl import add_entries, never_end
    from rollouts.streaming.tokens import add_tokens
    from scripts.new_model import qwen3, save
    from scripts.tiny_models import make_tokenizer

    sizes = (
        {"hidden": 64, "layers": 2, "heads": 4}
        if quick
        else {"hidden": 768, "layers": 5, "heads": 12}
    )
    tokenizer = make_tokenizer("<|endoftext|>")
    add_tokens(tokenizer)
    config = qwen3(tokenizer, **sizes, vocab=2048 if quick else 151_936)
    config.num_key_value_heads = sizes["heads"] // 2
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    never_end(model)
    save(folder, model, tokenizer)
    add_entries(folder / "tokenizer.json", config.vocab_size)


def overrides(method: str, args: argparse.Namespace) -> list[str]:
    """The arguments of `train.py` for a method."""
    prompts, new_tokens = (4, 8) if args.quick else (128, 128)
    steps = PROFILED if method == "profile" else args.steps
    keys = {
        "model.path": args.work / "student",
        "model.dtype": "float32" if args.quick else "bfloat16",
        "data.path": "stories",
        "data.stories": steps * prompts,
        "train.steps": steps,
        "train.prompts_per_step": prompts,
        "train.tokens_per_microbatch": 16_384,
        "train.lr": 1e-5,
        "checkpoint.every": 0,
        "eval.every": -1,
        "log.wandb": "disabled",
        "log.completions": 0,
        "run.dir": args.work / "runs" / method,
    }
    if method != "streaming":
        keys |= {
            "teacher.path": args.work / "teacher",
            "teacher.dtype": keys["model.dtype"],
            "rollout.engine": "hf",
            "rollout.batch_size": prompts,
            "rollout.max_new_tokens": new_tokens,
        }
    return [*METHODS[method], *(f"{key}={value}" for key, value in keys.items())]


def train(method: str, args: argparse.Namespace, until: float) -> dict:
    """Train with a method; returns what it took, or the operators of the last step.

    Args:
        until: of time.monotonic; it then ends, if it has measured a step.
    """
    import torch

    from recipes.compose import compose
    from trainers.loop import Loop
    from trainers.prepare import prepare

    profiles: list[list[dict]] = []

    class Profiled(Loop):
        def step(self, step: int):
            if method != "profile" and step > PROFILED and time.monotonic() > until:
                raise OutOfTime
            if method != "profile" or step < self.config.train.steps:
                return super().step(step)
            with torch.profiler.profile(activities=activities(args.device)) as profile:
                found = super().step(step)
            profiles.append(operators(profile))
            return found

        def save(self, step: int) -> None:
            """Nothing, which saves gigabytes."""

    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    calls = count_kernels()
    started = time.monotonic()
    loop = Profiled(prepare(compose(overrides(method, args))))
    with contextlib.suppress(OutOfTime):
        loop.fit()
    loop.finish()
    folder = args.work / "runs" / method
    found = {"method": method, "seconds": round(time.monotonic() - started, 1)}
    found |= summary(folder / "metrics.jsonl")
    found["attention"] = dict(calls)
    if cuda:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
        found["before_gib"] = round(before / 2**30, 3)
    if profiles:
        found["operators"] = profiles[0]
    loop.engine.close()
    return found


def count_kernels() -> Counter[str]:
    """How often each kernel of packed attention is called from now on, by its name."""
    from trainers.core.attention_kernels import KERNELS

    calls: Counter[str] = Counter()

    def counted(name: str, kernel: Callable) -> Callable:
        def call(*arguments, **options):
            calls[name] += 1
            return kernel(*arguments, **options)

        return functools.wraps(kernel)(call)

    for name, kernel in KERNELS.items():
        KERNELS[name] = counted(name, getattr(kernel, "__wrapped__", kernel))
    return calls


def summary(metrics: Path) -> dict:
    """Medians over the steps after the warm-up, and the losses."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [row for row in rows if "time/step" in row]
    counted = rows[WARMUP:] or rows
    phases = sorted({name for row in counted for name in row if name.startswith("time/")})
    found = {name: statistics.median(r[name] for r in counted if name in r) for name in phases}
    update = [r["train/tokens"] / r["time/update"] for r in counted]
    return {
        "steps": len(counted),
        "tokens_per_second": statistics.median(r["perf/tokens_per_second"] for r in counted),
        "update_tokens_per_second": statistics.median(update),
        "tokens": statistics.median(r["train/tokens"] for r in counted),
        **found,
        "losses": [row["train/loss"] for row in rows],
        "gradient_norms": [row["train/grad_norm"] for row in rows],
    }


def activities(device: str) -> list:
    """What the profiler watches."""
    from torch.profiler import ProfilerActivity

    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]


def operators(profile) -> list[dict]:
    """The operators that take the longest, on the device where there is one; milliseconds."""
    rows = [
        {
            "name": event.key[:120],
            "calls": event.count,
            "device_ms": round(event.self_device_time_total / 1000, 3),
            "cpu_ms": round(event.self_cpu_time_total / 1000, 3),
        }
        for event in profile.key_averages()
    ]
    rows.sort(key=lambda row: (-row["device_ms"], -row["cpu_ms"]))
    return rows[:OPERATORS]


def attempt(method: str, args: argparse.Namespace, until: float) -> dict:
    """What a method took, or why it failed."""
    try:
        return train(method, args, until)
    except Exception as error:
        print(traceback.format_exc(), file=sys.stderr)
        end = traceback.format_exc().strip()[-1500:]
        return {"method": method, "reason": f"{type(error).__name__}: {error}"[:500], "trace": end}


def main() -> int:
    from scripts.cli import quiet_libraries, quiet_torch

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.training", description=__doc__)
    add = parser.add_argument
    add("methods", nargs="+", choices=METHODS)
    add("--device", choices=("cuda", "cpu"), required=True)
    add("--steps", type=int, required=True)
    add("--quick", action="store_true")
    add("--seconds", type=float, default=float("inf"), help="the methods share them")
    add("--work", type=Path, required=True, help="folder of models and runs")
    add("--out", type=Path, required=True, help="file that gets a line for each method")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    quiet_libraries()
    quiet_torch()

    for seed, name in enumerate(("student", "teacher"), 1):
        if not (args.work / name).exists():
            # Renamed when it is whole: a process that dies here leaves no model to the next one.
            make_model(args.work / f"{name}.part", seed, args.quick)
            (args.work / f"{name}.part").rename(args.work / name)
    for index, method in enumerate(args.methods):
        now = time.monotonic()
        row = attempt(method, args, now + (end - now) / (len(args.methods) - index))
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        gc.collect()
        if args.device == "cuda" and not usable_gpu():
            return AGAIN
    return 0


def usable_gpu() -> bool:
    """Give back what a method held. After an illegal access the process can use the GPU no more."""
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as train.py does: all is written
