"""A run of `train.py` in a forked process, with a fault or without; and how two runs differ."""

from __future__ import annotations

import json
import os
import re
import runpy
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from recipes.errors import OnstreamError
from scripts import compare_runs
from scripts.fault_campaign import inject
from scripts.fault_campaign.faults import Fault
from scripts.fault_campaign.processes import Child, Ended, start
from scripts.fault_campaign.recipes import ROOT

# Seconds that a run may take.
DEADLINE = 120.0
RESUMED_FROM = re.compile(r"^resume  from .*step_(\d+)$", re.M)


def begin(
    overrides: list[str],
    log: Path,
    fault: Fault | None = None,
    scene: inject.Scene | None = None,
    variables: Mapping[str, str] | None = None,
) -> Child:
    """Start `python train.py OVERRIDES`, into which a fault is brought."""

    def work() -> None:
        os.environ.update(variables or {})
        if fault is not None and scene is not None:
            inject.bring(scene, fault.place, fault.action, fault.before)
        sys.argv = ["train.py", *overrides]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    return start(work, log)


def train(
    overrides: list[str],
    log: Path,
    fault: Fault | None = None,
    scene: inject.Scene | None = None,
    ranks: int = 1,
    deadline: float = DEADLINE,
) -> list[Ended]:
    """How each rank of a run ended. A fault is brought into the last one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(ranks):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        here = log if ranks == 1 else log.with_name(f"{log.name}_rank_{rank}")
        own = fault if rank == ranks - 1 else None
        children.append(begin(overrides, here, own, scene, variables if ranks > 1 else None))
    return [child.wait(deadline) for child in children]


def records(run: Path) -> list[dict]:
    """The rows of metrics.jsonl, without times and memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}
        for row in map(json.loads, lines)
    ]


def times(run: Path) -> list[float]:
    """The seconds that stand in metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)
    return [value for row in rows for key, value in row.items() if key.startswith("time/")]


def differences(wanted: Path, found: Path) -> list[str]:
    """Where a run differs from another one, in words: records, samples, checkpoints, curves."""
    try:
        lines = compare_runs.differences(wanted, found)
    except OnstreamError as error:
        return [str(error)]
    curves = [run / "curves.json" for run in (wanted, found)]
    policies = [json.loads(path.read_text())["policies"] for path in curves if path.exists()]
    if len(policies) == 1 or policies[:1] != policies[1:]:
        lines.append("curves.json differs")
    return lines


def debris(run: Path) -> list[str]:
    """What is left in a run's directory of work that was not finished."""
    kinds = ("checkpoints/.*", "*.tmp", "*.partial")
    return sorted(str(path.relative_to(run)) for kind in kinds for path in run.glob(kind))


def resumed_from(out: str) -> int:
    """The step that a run went on from, as it says on stdout; 0: from the start."""
    found = RESUMED_FROM.search(out)
    return int(found[1]) if found else 0
