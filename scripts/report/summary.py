"""The figures of a run that stand above the charts."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

import numpy as np

from scripts.report.cards import Line, at_steps, palette, phases, titled
from scripts.report.directory import Run
from scripts.report.numbers import short, smoothed


@dataclass
class Tile:
    """One figure. That of a change also has the value at the start of the run."""

    name: str
    value: str
    unit: str = ""
    about: str = ""
    line: Line | None = None
    headline: bool = False  # compares the ends of the run
    before: str = ""
    change: str = ""
    verdict: str = ""  # of the change: good, bad or nothing


def make_tiles(run: Run) -> list[Tile]:
    """The figures of a run, those that compare its ends first."""
    accuracy = _held_out(run, "avg@[^/]+")[:2]
    tiles = []
    for key in accuracy or ["reward/accuracy"]:
        data = key.removeprefix("eval/").rpartition("/")[0]
        name = titled("Accuracy", data, accuracy)
        tiles.append(_change(run, name, [key], "%", 1))
    length, truncated = _held_out(run, "length_mean"), _held_out(run, "truncated_frac")
    tiles += [
        _change(run, "Mean length", [*length, "rollout/length_mean"], "tokens", 0),
        _change(run, "Truncated", [*truncated, "rollout/truncated_frac"], "%", -1),
        _change(run, "Latency", _held_out(run, "latency_s"), "s", -1),
        _median(run, "Gradient norm", "train/grad_norm", about="before clipping"),
        _median(run, "Step time", "time/step", "s", _phase_text(run)),
        _median(run, "Tokens per second", "perf/tokens_per_second", about=_memory_text(run)),
        _steps(run),
    ]
    return [tile for tile in tiles if tile]


def _held_out(run: Run, metric: str) -> list[str]:
    return [key for key in sorted(run.series) if re.match(f"eval/.+/{metric}$", key)]


def _change(run: Run, name: str, keys: list[str], unit: str, good: int) -> Tile | None:
    """The first logged metric at either end of the run. `good` is the sign of a good change."""
    logged = [key for key in keys if key in run.series]
    if not logged:
        return None
    line = _known(run, logged[0])
    # A score in points is no share.
    percent = "%" if unit == "%" and line.y.max() <= 1.001 else ""
    # A single step is noisy and is averaged with its neighbours; an evaluation is not.
    width = 1 if logged[0].startswith("eval/") else max(1, len(line.y) // 20)
    first = line.y[:width].mean()
    last = line.y[-width:].mean()
    tile = Tile(name, short(last, percent), unit.replace("%", ""), headline=True)
    tile.line = line
    if width == 1:
        tile.about = f"{logged[0]}, step {line.x[0]:.0f} → {line.x[-1]:.0f}"
    else:
        tile.about = f"{logged[0]}, first → last {width} steps"
    if len(line.y) > width:
        tile.before = short(first, percent)
        tile.change = _change_text(first, last, percent)
        tile.verdict = {1: "good", -1: "bad"}.get(np.sign(last - first) * good, "")
    return tile


def _change_text(first: float, last: float, unit: str) -> str:
    if unit == "%":
        text = f"{100 * (last - first):+.1f} pts"
    elif first:
        text = f"{100 * (last - first) / first:+.0f}%"
    else:
        text = ""
    return text.replace("-", "−")


def _median(run: Run, name: str, key: str, unit: str = "", about: str = "") -> Tile | None:
    if key not in run.series:
        return None
    line = _known(run, key)
    return Tile(f"{name}, median", short(np.median(line.y)), unit, about, line)


def _known(run: Run, key: str) -> Line:
    """A metric without its gaps."""
    steps, values = run.series[key]
    known = np.isfinite(values)
    return Line(key, palette(0), steps[known], values[known], trend=smoothed(values[known]))


def _phase_text(run: Run) -> str:
    return " · ".join(f"{line.label} {short(line.y.mean())}" for line in phases(run))


def _memory_text(run: Run) -> str:
    if "perf/peak_memory_gib" not in run.series:
        return ""
    _, memory = run.series["perf/peak_memory_gib"]
    return short(np.nanmax(memory), "GiB at the peak")


def _steps(run: Run) -> Tile | None:
    """How far the run is, and how long its steps took."""
    trained = [steps for key, (steps, _) in run.series.items() if key.startswith("train/")]
    if not trained:
        return None
    steps = np.unique(np.concatenate(trained))
    seconds = np.nansum(at_steps(run, "time/step", steps))
    planned = run.config.get("train.steps")
    tile = Tile("Steps", str(len(steps)), f"of {planned}" if planned else "")
    if seconds:
        tile.about = f"{datetime.timedelta(seconds=round(seconds))} in steps"
    return tile
