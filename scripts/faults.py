"""Faults of every kind, brought into a run of every recipe: whether anything is lost.

    python -m scripts.faults [--recipes A,B] [--faults X,Y] [--jobs N] [--write] [--quick]

Each run takes three steps on the embedded models, on one core of the CPU. A fault is injected from
outside: functions of the library are wrapped in the run's process, and the library knows nothing of
it. Then `resume=auto` goes on. Its records, samples and final weights must be those of a run that
nothing happened to, bit for bit. Each cell is printed as it is finished. The command exits with 1
where a run lost something, hung, left something over, or ended without a line that says why.

A full disk is a tmpfs of the run's own. Where the system allows none, a limit on the size of files
stands for it. Linux only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from scripts.cli import quiet_libraries

# What the test suite runs.
QUICK = {"poweropd": ("kill_update", "kill_save", "nan", "corrupt")}


def main(arguments: list[str]) -> int:
    """Returns 1 where a cell is not as it should be."""
    options = parse(arguments)
    prepare_environment()
    from scripts.fault_campaign.campaign import campaign
    from scripts.fault_campaign.page import line, write

    started, found = time.monotonic(), []
    # A TemporaryDirectory would be removed by the first forked run that ends.
    folder = Path(options.folder or tempfile.mkdtemp(prefix="faults_")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(len(faults) for _, faults in options.pairs)
    try:
        for cell in campaign(options.pairs, folder, options.jobs):
            found.append(cell)
            print(f"[{len(found)}/{total}] {line(cell)}", flush=True)
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = time.monotonic() - started
    wrong = [cell for cell in found if not cell.good]
    for cell in wrong:
        print(f"NOT OK  {line(cell)}")
    print(f"{len(found)} cells, {len(wrong)} not ok, {seconds:.0f} s")
    if options.write:
        print(f"wrote {write(found, seconds, options.jobs)}")
    return int(bool(wrong))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, with `pairs`: recipes, each with the names of its faults."""
    from scripts.fault_campaign.faults import FAULTS
    from scripts.fault_campaign.recipes import RECIPES

    parser = argparse.ArgumentParser(
        prog="python -m scripts.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipes", help=f"of {', '.join(RECIPES)}; default: all")
    parser.add_argument("--faults", help=f"of {', '.join(FAULTS)}; default: all")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="a few faults of one recipe")
    parser.add_argument("--write", action="store_true", help="write docs/results/faults.md")
    parser.add_argument("--folder", help="a new one; runs that are not ok stay there")
    options = parser.parse_args(arguments)
    for name, known in (("recipes", RECIPES), ("faults", FAULTS)):
        chosen = getattr(options, name)
        values = chosen.split(",") if chosen else list(known)
        if unknown := set(values) - set(known):
            parser.error(f"--{name}: no such name: {', '.join(sorted(unknown))}")
        setattr(options, name, values)
    if options.folder and Path(options.folder).exists() and any(Path(options.folder).iterdir()):
        parser.error(f"--folder {options.folder}: is not empty")
    options.pairs = [
        (recipe, tuple(f for f in options.faults if recipe in (FAULTS[f].recipes or RECIPES)))
        for recipe in options.recipes
    ]
    # Those with the most faults first, so that the cores end together.
    options.pairs.sort(key=lambda pair: -len(pair[1]))
    if options.quick:
        options.pairs = list(QUICK.items())
    return options


def prepare_environment() -> None:
    """One thread, the CPU, no other torchrun: read when torch is imported."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    os.environ |= {name: "1" for name in threads} | {"CUDA_VISIBLE_DEVICES": ""}
    quiet_libraries()
    from scripts.cli import quiet_torch

    quiet_torch()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
