"""The campaign's results in words: a line per cell, and docs/results/faults.md."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from pathlib import Path

from scripts.fault_campaign.cells import Cell
from scripts.fault_campaign.faults import FAULTS, KILLS
from scripts.fault_campaign.recipes import RECIPES, ROOT

PROCESS = re.compile(r"process \d+ on [\w.-]+")
PAGE = ROOT / "docs" / "results" / "faults.md"


def line(cell: Cell) -> str:
    """`RECIPE x FAULT: verdict  seconds  end  …`."""
    parts = [f"{cell.recipe} x {cell.fault}: {cell.verdict}"]
    if cell.verdict != "-":
        parts.append(f"{cell.seconds:.1f} s")
    parts += [cell.end, repeated(cell), cell.detail or cell.message[:160]]
    return "  ".join(part for part in parts if part)


def repeated(cell: Cell) -> str:
    """What was lost: the steps that the resumed run took again."""
    if cell.repeated is None:
        return ""
    return f"{cell.repeated} step{'' if cell.repeated == 1 else 's'} repeated"


def write(cells: Sequence[Cell], seconds: float, jobs: int) -> Path:
    """Write the page; returns its path."""
    by_place = {(cell.recipe, cell.fault): cell for cell in cells}
    recipes = [name for name in RECIPES if any(cell.recipe == name for cell in cells)]
    faults = [name for name in FAULTS if any(cell.fault == name for cell in cells)]
    good = sum(cell.verdict == "ok" for cell in cells)
    without = sum(cell.verdict == "-" for cell in cells)
    wrong = [cell for cell in cells if not cell.good]
    lines = [
        "# Faults",
        "",
        "`python -m scripts.faults --write` makes this page. Each cell is a run of three steps on",
        "the embedded models, with one fault in its second step. Then `resume=auto` goes on.",
        "`ok` means: the run ended with the right status and one line that says why; nothing hung;",
        "no process, lock or half-written folder is left; and the resumed run has the records, the",
        "samples and the final weights of a run that nothing happened to, bit for bit.",
        "`train/loss`, `train/grad_norm`, `reward/mean` and all other numbers are compared.",
        "",
        f"{len(cells)} cells: {good} ok, {len(wrong)} not ok, {without} where the recipe has no",
        f"such place (–). They took {seconds / 60:.0f} minutes on {jobs} cores of "
        f"{platform.machine()}, without a GPU.",
        "",
        "## Resume after SIGKILL",
        "",
        *table(recipes, [name for name in faults if name in KILLS], by_place),
        "",
        "## Other faults",
        "",
        *table(recipes, [name for name in faults if name not in KILLS], by_place),
        "",
        "## The faults",
        "",
        "`Repeated` is what was lost: the steps that the resumed run took again, with a checkpoint",
        "in each step.",
        "",
        "| fault | what happens | ends with | repeated | its line |",
        "|---|---|---|---|---|",
        *(description(name, cells) for name in faults),
    ]
    if wrong:
        lines += ["", "## Not ok", ""]
        lines += [
            f"- {cell.recipe}, `{cell.fault}`: {cell.verdict}, {cell.detail}" for cell in wrong
        ]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return PAGE


def table(recipes: Sequence[str], faults: Sequence[str], cells: dict) -> list[str]:
    """Recipe x fault: the verdict, and the seconds of all runs of the cell."""
    if not faults:
        return ["(none was run)"]
    rows = [f"| recipe | {' | '.join(f'`{name}`' for name in faults)} |"]
    rows.append("|---" * (len(faults) + 1) + "|")
    for recipe in recipes:
        entries = [entry(cells.get((recipe, name))) for name in faults]
        rows.append(f"| `{recipe}` | {' | '.join(entries)} |")
    return rows


def entry(cell: Cell | None) -> str:
    """A cell of the table."""
    if cell is None:
        return ""
    if cell.verdict == "-":
        return "–"
    verdict = "ok" if cell.good else f"**{cell.verdict}**"
    return f"{verdict} {cell.seconds:.0f} s"


def description(name: str, cells: Sequence[Cell]) -> str:
    """The fault's row, with the ends and the most steps repeated of its cells."""
    mine = [cell for cell in cells if cell.fault == name and cell.verdict != "-"]
    ends = ", ".join(sorted({cell.end for cell in mine if cell.end}))
    most = [cell.repeated for cell in mine if cell.repeated is not None]
    message = next((cell.message for cell in mine if cell.message), "")
    shown = PROCESS.sub("process PID on HOST", message.replace("|", "\\|").replace("`", "'"))
    row = (f"`{name}`", FAULTS[name].meaning, ends, str(max(most)) if most else "", shown)
    return f"| {' | '.join(row)} |"
