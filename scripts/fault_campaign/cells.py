"""A recipe's run against a fault: what came of it, and whether that is as it should be."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.fault_campaign import corruption, disk, runs
from scripts.fault_campaign.faults import FAULTS, Fault
from scripts.fault_campaign.inject import FIRED, GO, Scene, make_room
from scripts.fault_campaign.processes import Ended
from scripts.fault_campaign.recipes import overrides

STEPS = 3
# Places that a method has which samples.
SAMPLING = ("rollout", "sync", "vllm")


class Wrong(Exception):
    """A run did not end as it should.

    Args:
        verdict: `lost`, `hung`, `silent` (no line says what happened), `wrong end`, `left over`,
            `not injected`.
        detail: what was found.
    """

    def __init__(self, verdict: str, detail: str):
        super().__init__(f"{verdict}: {detail}")
        self.verdict, self.detail = verdict, detail


@dataclass
class Cell:
    """What came of a fault in a recipe.

    Attributes:
        verdict: `ok`, `-` where the recipe has no such place, or that of `Wrong`.
        seconds: of all its runs.
        end: how the run with the fault ended.
        repeated: steps that the resumed run took again; None: nothing was resumed.
        message: the line on stderr of the run with the fault.
        detail: what is wrong.
        good: `ok` or `-`.
    """

    recipe: str
    fault: str
    verdict: str = "ok"
    seconds: float = 0.0
    end: str = ""
    repeated: int | None = None
    message: str = ""
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.verdict in ("ok", "-")


@dataclass
class Subject:
    """A recipe with its uninterrupted runs, by their names."""

    recipe: str
    folder: Path
    keys: list[str] = field(default_factory=list)
    whole: set[str] = field(default_factory=set)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.keys = overrides(self.recipe, self.folder)

    def uninterrupted(self, ranks: int = 1, setting: Mapping[str, Any] = {}) -> Path:
        """The directory of the run that nothing happened to, with so many ranks.

        Raises:
            Wrong: it failed.
        """
        extra = [f"{key}={value}" for key, value in setting.items()]
        name = "_".join(["uninterrupted", str(ranks), *extra])
        run = self.folder / name / "run"
        if name not in self.whole:
            keys = [*self.keys, *extra, f"run.dir={run}"]
            for ended in runs.train(keys, run.parent / "log", ranks=ranks):
                if ended.status or ended.hung:
                    raise Wrong("uninterrupted run failed", f"{ended.how}: {ended.message}")
            self.whole.add(name)
        return run

    def step(self, fault: Fault) -> int | None:
        """The step that a fault goes to: the second, or the third where the second has no update
        or the place is only there. None: the recipe has no such place."""
        rows = [row for row in runs.records(self.uninterrupted()) if "train/loss" in row]
        if fault.place in SAMPLING and "rollout/length_mean" not in rows[0]:
            return None
        if fault.place == "finish":
            return STEPS
        updated = [row["step"] for row in rows[1:] if row["train/loss"] is not None]
        return updated[0] if updated else None


def judge(subject: Subject, name: str) -> Cell:
    """Bring a fault into a recipe's run, and see what comes of it."""
    fault, cell = FAULTS[name], Cell(subject.recipe, name)
    folder = subject.folder / name
    started = time.monotonic()
    try:
        step = subject.step(fault)
        if step is None:
            cell.verdict = "-"
            return cell
        scene = Scene(step, folder)
        scene.disk.mkdir(parents=True)
        KINDS[fault.kind](subject, fault, scene, cell)
    except Wrong as wrong:
        cell.verdict, cell.detail = wrong.verdict, wrong.detail
    finally:
        cell.seconds = time.monotonic() - started
        cell.message = cell.message.replace(f"{folder}/disk/run", "RUN")
        cell.detail = cell.detail.replace(f"{folder}/disk/run", "RUN")
        if cell.good:
            shutil.rmtree(folder, ignore_errors=True)
    return cell


def resumed(subject: Subject, fault: Fault, scene: Scene, cell: Cell) -> None:
    """The run ends in its way, and `resume=auto` then makes of it what it would have been."""
    wanted = subject.uninterrupted(fault.ranks, fault.setting)
    with disk.own(scene.disk) if "disk" in cell.fault else disk.shared():
        broken(subject, fault, scene, cell)
        make_room(scene)
        go_on(subject, fault, scene, cell, wanted)


def broken(subject: Subject, fault: Fault, scene: Scene, cell: Cell) -> Path:
    """The run with the fault; its directory.

    Raises:
        Wrong: it ended otherwise than it should.
    """
    run = scene.disk / "run"
    extra = [f"{key}={value}" for key, value in (fault.setting | fault.keys).items()]
    keys = [*subject.keys, *extra, f"run.dir={run}"]
    ends = runs.train(keys, scene.folder / "broken", fault, scene, fault.ranks)
    # The fault is brought into the last rank.
    *others, last = ends
    cell.end, cell.message = ", ".join(ended.how for ended in ends), last.line
    if not (scene.folder / FIRED).exists():
        raise Wrong("not injected", f"{last.how}: {last.message}")
    check_end(last, fault)
    for ended in others:
        if not ended.status:
            raise Wrong("wrong end", f"a rank beside it ended with {ended.how}")
        check_end(ended, fault, ended.status, says="")
        cell.message = ended.line
    return run


def check_end(ended: Ended, fault: Fault, status: int | None = None, says: str | None = None):
    """Raises Wrong: it hung, left a process, or has another status or message than it should.

    An error that nobody foresaw may have its traceback, before the line that the run ends with.
    """
    status = fault.status if status is None else status
    says = fault.says if says is None else says
    if ended.hung:
        raise Wrong("hung", f"no end after {ended.seconds:.0f} s")
    if ended.left:
        raise Wrong("left over", f"processes {', '.join(ended.left)}")
    if ended.status > 0 and ended.status != 143:
        if not ended.message:
            raise Wrong("silent", f"{ended.how} without a line on stderr")
        if not ended.message.startswith("error"):
            raise Wrong("traceback", f"{ended.how}: {ended.message}")
        if not re.search(says, ended.message):
            raise Wrong("silent", f"the message does not name {says!r}: {ended.message}")
    if ended.status != status:
        raise Wrong("wrong end", f"{ended.how}, not exit {status}: {ended.message}")


def go_on(subject: Subject, fault: Fault, scene: Scene, cell: Cell, wanted: Path) -> None:
    """`resume=auto` after a fault.

    Raises:
        Wrong: the run ends otherwise, or is another one than the uninterrupted run.
    """
    run = scene.disk / "run"
    setting = [f"{key}={value}" for key, value in fault.setting.items()]
    keys = [*subject.keys, *setting, f"run.dir={run}", "resume=auto"]
    ends = runs.train(keys, scene.folder / "resumed", ranks=fault.ranks)
    for ended in ends:
        if ended.hung:
            raise Wrong("hung", f"the resumed run has no end after {ended.seconds:.0f} s")
        if ended.status:
            raise Wrong("lost", f"resume=auto: {ended.how}: {ended.message}")
    cell.repeated = max(0, scene.step - runs.resumed_from(ends[0].out))
    if cell.repeated > fault.repeats:
        raise Wrong("lost", f"{cell.repeated} steps, not {fault.repeats}")
    check_equal(wanted, run)


def check_equal(wanted: Path, run: Path) -> None:
    """Raises Wrong: a run is not the one that it should be, or something is left over."""
    if lines := runs.differences(wanted, run):
        raise Wrong("lost", "; ".join(lines[:4]))
    if left := runs.debris(run):
        raise Wrong("left over", ", ".join(left))


def skipped(subject: Subject, fault: Fault, scene: Scene, cell: Cell) -> None:
    """The updates of the step are skipped and counted; all before it is as it was."""
    wanted = runs.records(subject.uninterrupted())
    run = broken(subject, fault, scene, cell)
    rows = runs.records(run)
    before = [row for row in rows if row["step"] < scene.step]
    if before != [row for row in wanted if row["step"] < scene.step]:
        raise Wrong("lost", f"rows before step {scene.step} differ")
    steps = {row["step"]: row for row in rows if "train/loss" in row}
    if not steps[scene.step]["train/nonfinite"]:
        raise Wrong("silent", f"train/nonfinite is 0 in step {scene.step}")
    if steps[STEPS]["train/nonfinite"] or steps[STEPS]["train/loss"] is None:
        raise Wrong("lost", "the step after it has no update either")
    cell.message = "counted in train/nonfinite"


def clock(subject: Subject, fault: Fault, scene: Scene, cell: Cell) -> None:
    """The run ends as without the jump, and its times are those that went by."""
    run = broken(subject, fault, scene, cell)
    check_equal(subject.uninterrupted(), run)
    rows = runs.times(run)
    if strange := [value for value in rows if not 0 <= value < runs.DEADLINE]:
        raise Wrong("lost", f"seconds in metrics.jsonl: {strange}")
    go_on(subject, fault, scene, cell, subject.uninterrupted())


def writers(subject: Subject, fault: Fault, scene: Scene, cell: Cell) -> None:
    """The second run names the first one, which is not disturbed."""
    run = scene.disk / "run"
    keys = [*subject.keys, f"run.dir={run}"]
    first = runs.begin(keys, scene.folder / "first", fault, scene)
    end = time.monotonic() + runs.DEADLINE
    while not (scene.folder / FIRED).exists() and time.monotonic() < end:
        time.sleep(0.05)
    (second,) = runs.train([*keys, "resume=auto"], scene.folder / "second")
    (scene.folder / GO).touch()
    ended = first.wait(runs.DEADLINE)
    cell.end, cell.message = f"{ended.how}, second {second.how}", second.line
    check_end(second, fault, status=1, says=f"process {first.pid}")
    check_end(ended, fault, status=0)
    check_equal(subject.uninterrupted(), run)


def corrupt(subject: Subject, fault: Fault, scene: Scene, cell: Cell) -> None:
    """Each changed file is named, and the checkpoint before it is taken."""
    wanted = subject.uninterrupted()
    run = shutil.copytree(wanted, scene.disk / "run")
    unseen = corruption.unseen(run, [*subject.keys, f"run.dir={run}"], scene.folder)
    if unseen:
        raise Wrong("silent", f"{len(unseen)} changed bytes unnoticed: {'; '.join(unseen[:4])}")
    newest = run / "checkpoints" / f"step_{STEPS}"
    files = [path for path in newest.rglob("*") if path.is_file()]
    corruption.flip(max(files, key=lambda path: path.stat().st_size))
    scene.step = STEPS - 1
    go_on(subject, fault, scene, cell, wanted)
    cell.end = "exit 0"
    cell.message = "each file is named"


Kind = Callable[[Subject, Fault, Scene, Cell], None]
KINDS: dict[str, Kind] = {
    "resumed": resumed,
    "skipped": skipped,
    "clock": clock,
    "writers": writers,
    "corrupt": corrupt,
}
