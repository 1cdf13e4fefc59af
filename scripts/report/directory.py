"""What a run directory holds, as the report reads it.

A file that is missing or cannot be read counts as empty. A line of metrics that is not JSON (the
last one of a killed run) is skipped and counted. Of a step logged twice (a resumed run) the last
value counts.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scripts.report.numbers import finite, number, numbers

SAMPLES_PER_STEP = 4
STEP = re.compile(r'"step": *(\d{1,15})')

Series = dict[str, tuple[np.ndarray, np.ndarray]]
Positions = tuple[int, np.ndarray, np.ndarray]
Samples = list[tuple[int, list[dict]]]


@dataclass(eq=False)
class Run:
    """What one run directory holds."""

    path: Path
    recipe: str
    config: dict  # dotted key -> value
    config_text: str  # config.yaml as it is
    series: Series  # metric name -> steps [N], values [N] with NaN for a gap
    positions: list[Positions]  # step, starts of the bins in tokens [P], mean token rewards [P]
    samples: Samples  # step, some of its rows of completions.jsonl
    skipped: int  # unreadable lines of metrics.jsonl
    curves: dict  # curves.json
    label: str = ""  # its name among the runs of this report


def read_run(path: Path) -> Run:
    """Read a run directory; nothing in it is required."""
    series, positions, skipped = _read_metrics(path / "metrics.jsonl")
    text = "".join(_lines(path / "config.yaml"))
    config = _read_config(text)
    return Run(
        path=path,
        recipe=str(config.get("recipe") or path.resolve().name),
        config=config,
        config_text=text,
        series=series,
        positions=positions,
        samples=_read_samples(path / "completions.jsonl"),
        skipped=skipped,
        curves=_json_object("".join(_lines(path / "curves.json"))) or {},
    )


def name_runs(runs: list[Run]) -> None:
    """Set the label of every run: its recipe, with more of its path where that is not enough."""
    choices = (
        [run.recipe for run in runs],
        [f"{run.recipe}/{run.path.resolve().name}" for run in runs],
        [str(run.path) for run in runs],
    )
    distinct = (labels for labels in choices if len(set(labels)) == len(runs))
    for run, label in zip(runs, next(distinct, choices[-1])):
        run.label = label


def spread(items: list) -> list:
    """The first, middle and last item, each once."""
    places = {0, len(items) // 2, len(items) - 1} if items else ()
    return [items[place] for place in sorted(places)]


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file


def _json_object(text: str) -> dict | None:
    """The object that the text is; None where it is anything else."""
    # RecursionError: brackets nested by the thousand.
    value = None
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
    return value if isinstance(value, dict) else None


def _read_metrics(path: Path) -> tuple[Series, list[Positions], int]:
    """Returns the series, the rewards by position, and the number of unreadable lines."""
    values: dict[str, dict[float, float]] = defaultdict(dict)
    positions: dict[int, Positions] = {}
    skipped = 0
    for line in filter(str.strip, _lines(path)):
        row = _json_object(line) or {}
        step = number(row.pop("step", ""))
        if step is None or math.isnan(step):
            skipped += 1
            continue
        if found := _by_position(int(step), row):
            positions[int(step)] = found
        for key, value in row.items():
            scalar = number(value)
            if scalar is not None:
                values[key][step] = scalar
    series = {key: _as_series(points) for key, points in values.items()}
    # A metric that was never known has no curve.
    series = {key: curve for key, curve in series.items() if len(finite(curve[1]))}
    return series, [positions[step] for step in sorted(positions)], skipped


def _as_series(points: dict[float, float]) -> tuple[np.ndarray, np.ndarray]:
    steps = sorted(points)
    return np.array(steps), np.array([points[step] for step in steps])


def _by_position(step: int, row: dict) -> Positions | None:
    rewards = numbers(row.get("reward/by_position"))
    if not len(finite(rewards)):
        return None
    starts = numbers(row.get("reward/by_position_bins"))[: len(rewards)]
    if len(finite(starts)) < len(rewards):
        starts = np.arange(len(rewards), dtype=float)
    return step, starts, rewards


def _read_samples(path: Path) -> Samples:
    """A few rows of the first, the middle and the last step."""
    # A line that was cut off, the last of a killed run, does not end in a brace.
    whole = (line for line in _lines(path) if line.rstrip().endswith("}"))
    steps = {_step_of(line) for line in whole} - {None}
    samples: dict[int, list[dict]] = {step: [] for step in spread(sorted(steps))}
    # Lines of other steps are not parsed: the file of a long run has gigabytes.
    for line in _lines(path):
        step = _step_of(line)
        if step not in samples or len(samples[step]) == SAMPLES_PER_STEP:
            continue
        row = _json_object(line) or {}
        # What was matched may have been the text of a prompt.
        if row.get("step") == step:
            samples[step].append(row)
    return [(step, rows) for step, rows in samples.items() if rows]


def _step_of(line: str) -> int | None:
    match = STEP.search(line)
    return int(match[1]) if match else None


def _read_config(text: str) -> dict:
    """The values by dotted key."""
    import yaml

    from recipes.compose import flatten

    # TypeError: a key that is no text.
    with contextlib.suppress(yaml.YAMLError, ValueError, TypeError):
        config = yaml.safe_load(text)
        return flatten(config) if isinstance(config, dict) else {}
    return {}
