"""The faults: what happens, where in a run, and how the run must end."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scripts.fault_campaign import inject

# Recipes of every reading mode, for faults that take long.
FEW = ("poweropd", "grpo", "adasr", "proactivellm")
# Minutes that a phase may take where it stalls. It takes less than a second.
SOON = 0.07
KILLED = -signal.SIGKILL
STOPPED = 143
OVERDUE = 124


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault and the end that a run must make of it.

    Attributes:
        meaning: what happens, for the page.
        place: where, a key of `inject.PLACES`.
        action: what, a function of `inject`.
        before: before the work of the place, not after it.
        status: the exit status that is right.
        says: what the line of the error must hold, where there is one.
        keys: overrides of the run that the fault is brought into.
        setting: overrides of all runs of the cell, the uninterrupted one too.
        recipes: the ones that it is brought into; None: all.
        kind: how the cell is judged, a key of `cells.KINDS`.
        repeats: the most steps that a resumed run may have to take again.
        ranks: of the run.
    """

    meaning: str
    place: str = ""
    action: inject.Action = inject.kill
    before: bool = False
    status: int = KILLED
    says: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)
    setting: Mapping[str, Any] = field(default_factory=dict)
    recipes: tuple[str, ...] | None = None
    kind: str = "resumed"
    repeats: int = 1
    ranks: int = 1


def killed(place: str, meaning: str, **options) -> Fault:
    """SIGKILL."""
    return Fault(meaning=f"SIGKILL {meaning}", place=place, **options)


def stalled(place: str, meaning: str = "", **options) -> Fault:
    """A phase that never ends."""
    defaults = {"action": inject.stall, "before": True, "status": OVERDUE}
    defaults["says"] = rf"step \d: {place} has taken"
    defaults["keys"] = {f"deadline.{place}": SOON}
    meaning = meaning or f"the phase `{place}` never ends"
    return Fault(meaning=meaning, place=place, **(defaults | options))


def spoilt(action: inject.Action, meaning: str, **options) -> Fault:
    """A step whose gradients are not finite. The run skips it and goes on."""
    defaults = {"place": "update", "before": True, "status": 0, "kind": "skipped"}
    # A step of GRPO has more updates than the default allows.
    defaults["keys"] = {"train.max_nonfinite": 99}
    return Fault(meaning=meaning, action=action, **(defaults | options))


# What ends a run at its first gradient that is not finite.
LAST = {
    "status": 1,
    "kind": "resumed",
    "says": r"step \d+: .* not finite",
    "keys": {"train.max_nonfinite": 1},
}
# SIGKILL in every phase, in the order of a step.
KILLS = {
    "kill_rollout": killed("rollout", "when the samples are drawn"),
    "kill_annotate": killed("annotate", "when the samples are annotated"),
    "kill_update": killed("update", "between the backward pass and the optimizer's step"),
    "kill_optimizer": killed("optimizer", "when the optimizer has made its step"),
    "kill_sync": killed("sync", "when the engine has the new weights"),
    "kill_save": killed("save", "while a checkpoint is written"),
    "kill_rename": killed("rename", "when a checkpoint has just got its name", repeats=0),
    "kill_remove": killed(
        "remove",
        "while an old checkpoint is removed",
        before=True,
        keys={"checkpoint.keep": 1},
        repeats=0,
    ),
    "kill_evaluate": killed("evaluate", "in an evaluation", repeats=0),
    "kill_finish": killed("finish", "after the last step", repeats=0),
}
FAULTS = KILLS | {
    "terminate": Fault(
        meaning="SIGTERM in an update",
        place="update",
        action=inject.terminate,
        status=STOPPED,
        repeats=0,
    ),
    "nan": spoilt(inject.no_number, "a NaN gradient, and no more of them are allowed", **LAST),
    "infinite": spoilt(
        inject.infinite, "an infinite gradient, and no more of them are allowed", **LAST
    ),
    "nan_skipped": spoilt(inject.no_number, "NaN gradients in one step; the run goes on"),
    "infinite_skipped": spoilt(inject.infinite, "infinite gradients in one step; the run goes on"),
    "memory": Fault(
        meaning="no memory for a tensor of the update",
        place="pack",
        action=inject.out_of_memory,
        status=1,
        says=r"step \d: update: out of memory",
    ),
    "full_disk": Fault(
        meaning="the disk is full when a checkpoint is written",
        place="saving",
        action=inject.fill_disk,
        before=True,
        status=1,
        says="checkpoints/step_.* could not be written",
    ),
    "full_disk_records": Fault(
        meaning="the disk is full when a step's row is written",
        place="record",
        action=inject.fill_disk_wholly,
        before=True,
        status=1,
        says="No space left|metrics.jsonl",
    ),
    "engine": Fault(
        meaning="the rollout engine raises an error of its own",
        place="rollout",
        action=inject.engine_dies,
        status=1,
        says=r"step \d: rollout: .*worker process died",
    ),
    "engine_vllm": Fault(
        meaning="vLLM says that its engine is dead",
        place="vllm",
        action=inject.vllm_dies,
        before=True,
        status=1,
        says=r"step \d: rollout: .*(EngineDead|child process)",
        setting={"rollout.engine": "vllm"},
        recipes=("poweropd",),
    ),
    "stall_rollout": stalled("rollout"),
    "stall_annotate": stalled("annotate", recipes=FEW),
    "stall_update": stalled("update"),
    "stall_sync": stalled("sync", recipes=FEW),
    "stall_save": stalled("save"),
    "stall_evaluate": stalled("evaluate", repeats=0),
    "freeze": stalled(
        "update",
        "an update never returns from C, where no Python thread runs any more",
        action=inject.freeze,
        # The status that `faulthandler` ends with.
        status=1,
        recipes=FEW,
    ),
    "clock": Fault(
        meaning="the clock goes a year ahead, and then two years back",
        place="rollout",
        action=inject.clock_jumps,
        before=True,
        status=0,
        kind="clock",
        repeats=0,
    ),
    "writers": Fault(
        meaning="a second run is started into the directory of one that runs",
        place="update",
        action=inject.pause,
        status=0,
        kind="writers",
    ),
    "corrupt": Fault(
        meaning="a byte of one file of the newest checkpoint changes, of each file in turn",
        kind="corrupt",
        repeats=0,
    ),
    "rank_dies": killed("update", "of one rank of two, in an update", ranks=2, recipes=FEW),
    "rank_stalls": stalled("update", "one rank of two never ends its update", ranks=2, recipes=FEW),
}
