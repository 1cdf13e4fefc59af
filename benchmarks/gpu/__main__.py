"""bash benchmarks/gpu.sh: the GPU path, proved and measured, in stages with a time budget each.

    triton_tests     the Triton kernels by their own tests
    attention_tests  packed attention by its own tests
    kernels          python -m kernels.bench, beside torch and the other projects' that are there
    attention        the kernels of packed attention beside eager, in milliseconds
    training         PowerOPD beside vanilla and full-vocabulary distillation, LoRA, sdpa, and a
                     streaming layout, on random models of 150M parameters: tokens per second and
                     memory; and one step of PowerOPD by operator

A stage that fails, or takes too long, is recorded with its reason, and the others go on. The file
is written after each stage. The exit status is 1 where one failed.

vLLM and W&B are not needed. `training` needs deepspeed and hydra, the tests need pytest.
Packages that are missing can be given as a folder of wheels. They are unpacked into a
temporary folder, and change nothing in the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import stages
from benchmarks.gpu.stages import Job

# Of each stage: what runs it, and the most seconds that it may take.
STAGES: dict[str, tuple[Callable[[Job], dict], float]] = {
    "triton_tests": (stages.run_triton_tests, 60),
    "attention_tests": (stages.run_attention_tests, 120),
    "kernels": (stages.run_kernels, 110),
    "attention": (stages.run_attention, 50),
    # The last one has all that the others left.
    "training": (stages.run_training, 530),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bash benchmarks/gpu.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--quick", action="store_true", help="tiny shapes and two steps")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    add("--budget-s", type=float, default=530.0, help="seconds for everything")
    add("--wheels", type=Path, help="a folder of wheels of what is missing here")
    add("--out", type=Path, default=Path("gpu.json"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, and write the file; returns the exit status."""
    args = parse(arguments)
    started = time.monotonic()
    found: dict = {"device": None, "stages": {}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="onstream-gpu-") as work:
        environment = dict(os.environ)
        if args.wheels is not None:
            found["wheels"] = unpack(args.wheels, Path(work) / "packages", environment)
        found |= stages.describe(args.device, environment)
        for name in args.stages:
            run, seconds = STAGES[name]
            left = started + args.budget_s - time.monotonic()
            job = Job(args.device, args.quick, min(seconds, left), Path(work), environment)
            found["stages"][name] = attempt(run, job)
            found["seconds"] = round(time.monotonic() - started, 1)
            args.out.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}: {found['stages'][name]['status']}", flush=True)
    failed = [name for name, stage in found["stages"].items() if stage["status"] == "failed"]
    print(f"{args.out}: {found['seconds']} s on {found['device']}, failed: {failed or 'none'}")
    return 1 if failed else 0


def attempt(run: Callable[[Job], dict], job: Job) -> dict:
    """What a stage found, with its `status` and `seconds`; why, where it failed."""
    started = time.monotonic()
    if job.seconds < 5:
        return {"status": "skipped", "reason": "no time was left", "seconds": 0.0}
    try:
        found = {"status": "passed"} | run(job)
    # One stage's end is not that of the others, whatever it is.
    except Exception as error:
        found = {"status": "failed", "reason": stages.last_lines(f"{error!r}")}
    return found | {"seconds": round(time.monotonic() - started, 1)}


def unpack(wheels: Path, folder: Path, environment: dict[str, str]) -> list[str]:
    """Install the wheels of a folder into another one, for the stages; returns their names."""
    files = sorted(wheels.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    # Where an environment is managed, a folder of one's own still is not.
    environment["PIP_BREAK_SYSTEM_PACKAGES"] = "1"
    subprocess.run(
        [*command, "--target", str(folder), *map(str, files)], env=environment, check=True
    )
    paths = [str(folder), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    shutil.rmtree(folder / "bin", ignore_errors=True)
    return [file.name for file in files]


if __name__ == "__main__":
    sys.exit(main())
