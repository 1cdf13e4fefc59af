"""Compares two runs bit for bit: a resumed run with one that nothing interrupted.

    python -m scripts.compare_runs RUN_A RUN_B

These must agree:

    metrics.jsonl      every row in its order, with every value that no clock or memory decides
    completions.jsonl  every row, so every sampled token and its reward
    checkpoints        the newest step, every tensor of its folder, and the random states

Each difference is a line on stdout. The exit status is 1 where there is one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.errors import DataError
from scripts.cli import launch, run_command

# Names that begin or end so hold what a clock or the machine's memory decides.
MEASURED = (("time/", "perf/"), ("/latency_s", "/seconds_per_token"))
# Files of a checkpoint. Others may name the folder of their run.
COMPARED = ("*.safetensors", "random_*.json")
# Differences of one file that are listed.
LISTED = 5


def main(arguments: list[str]) -> int:
    """Print the differences of two runs; returns the exit status."""
    found: list[str] = []

    def compare(paths: list[str]) -> None:
        if len(paths) != 2:
            raise DataError("give two run directories: python -m scripts.compare_runs RUN_A RUN_B")
        found.extend(differences(*map(Path, paths)))
        print("\n".join(found) or "equal")

    return run_command(compare, arguments, __doc__, {}) or int(bool(found))


def differences(run_a: Path, run_b: Path) -> list[str]:
    """What two runs differ in, a line each; an empty list: they are equal.

    Args:
        run_a: a run directory.
        run_b: another one.

    Raises:
        DataError: a run has no records.
    """
    lines = [*_records(run_a, run_b, "metrics.jsonl"), *_records(run_a, run_b, "completions.jsonl")]
    return lines + list(_checkpoints(run_a, run_b))


def _records(run_a: Path, run_b: Path, name: str) -> Iterator[str]:
    """The differences of a .jsonl."""
    rows_a, rows_b = _rows(run_a / name), _rows(run_b / name)
    steps_a, steps_b = ([row["step"] for row in rows] for rows in (rows_a, rows_b))
    if steps_a != steps_b:
        yield f"{name}: its rows are of the steps {_ranges(steps_a)} and {_ranges(steps_b)}"
        return
    lines = (
        f"{name}: step {a['step']}, {key}: {_short(a.get(key))} and {_short(b.get(key))}"
        for a, b in zip(rows_a, rows_b)
        for key in sorted(a.keys() | b.keys())
        if a.get(key, "absent") != b.get(key, "absent")
    )
    yield from itertools.islice(lines, LISTED)
    if more := sum(1 for _ in lines):
        yield f"{name}: {more} more values differ"


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl without what is measured."""
    begins, ends = MEASURED
    try:
        # A text may hold U+2028, which str.splitlines takes for an end.
        rows = [json.loads(line) for line in file.open(encoding="utf-8", newline="\n")]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); give a finished run") from error
    return [
        {key: v for key, v in row.items() if not (key.startswith(begins) or key.endswith(ends))}
        for row in rows
    ]


def _checkpoints(run_a: Path, run_b: Path) -> Iterator[str]:
    """The differences of the newest checkpoints."""
    from trainers.core.checkpoint import complete

    newest = [checkpoints[-1] for checkpoints in map(complete, (run_a, run_b)) if checkpoints]
    if len(newest) < 2:
        yield f"checkpoints: {len(newest)} of the two runs have one"
        return
    a, b = newest
    if a.name != b.name:
        yield f"checkpoints: the newest are {a.name} and {b.name}"
        return
    files_a, files_b = (
        {str(path.relative_to(folder)) for pattern in COMPARED for path in folder.rglob(pattern)}
        for folder in newest
    )
    for file in sorted(files_a ^ files_b):
        yield f"{a.name}/{file}: only in {run_a if file in files_a else run_b}"
    for file in sorted(files_a & files_b):
        if file.endswith(".safetensors"):
            yield from (f"{a.name}/{file}: {line}" for line in _tensors(a / file, b / file))
        elif (a / file).read_bytes() != (b / file).read_bytes():
            yield f"{a.name}/{file} differs"


def _tensors(file_a: Path, file_b: Path) -> Iterator[str]:
    """The differences of two .safetensors, bit for bit."""
    import torch
    from safetensors.torch import load_file

    a, b = load_file(file_a), load_file(file_b)
    if a.keys() != b.keys():
        yield f"other tensors: {_short(sorted(a.keys() ^ b.keys()))}"
        return
    wrong = []
    for name in a:
        if a[name].dtype != b[name].dtype or a[name].shape != b[name].shape:
            yield f"{name} has another shape or type"
        elif not torch.equal(_bits(a[name]), _bits(b[name])):
            wrong.append((float((a[name].double() - b[name].double()).abs().max()), name))
    if wrong:
        largest, name = max(wrong)
        yield f"{len(wrong)} of {len(a)} tensors differ, by up to {largest:.3g} in {name}"


def _bits(tensor):
    """The bytes of a tensor: NaN equals itself there."""
    import torch

    return tensor.reshape(-1).view(torch.uint8)


def _ranges(steps: list[int]) -> str:
    """A list of steps in short, as 1-4, 4-9."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], step]
        else:
            parts.append([step])
    texts = ["-".join(map(str, dict.fromkeys(part))) for part in parts]
    return ", ".join(texts[:20]) + (", …" if len(texts) > 20 else "") if texts else "none"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


if __name__ == "__main__":
    launch(main)
