"""Methods side by side over seeds: runs each setting with each seed, then prints mean ± standard
deviation.

    python -m benchmarks.seeds outputs/compare "on-policy SFT: recipe=onpolicy_sft" \
        "GRPO: recipe=grpo" "fixed set: recipe=onpolicy_sft rollout.fixed_steps=10" --seeds 0 1 2

A setting is a name and the overrides of `train.py`. Runs come one after another, seed by seed, so
that what drifts on the machine reaches all settings alike; one that is finished is not repeated,
one that was broken off is resumed. The last line of each run is its final evaluation; "start" is
the evaluation before the first step, over all runs. The standard deviation is that of the seeds (n
- 1). Runs that end with latency-quality curves get a table of their points, and the means as
OUT/NAME/curves.json, of which `python -m scripts.report OUT/NAME …` draws one chart. Time per step
is the median over a run's steps but the first, peak memory that of the run's process. """

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(folder: Path, overrides: list[str], seed: int) -> None:
    """One run, or the rest of one. Raises SystemExit: it failed."""
    if (folder / "finished").exists():
        return
    command = [
        sys.executable,
        "train.py",
        *overrides,
        f"seed={seed}",
        f"run.dir={folder}",
        "resume=auto",
        "log.wandb=disabled",
        "log.every=10",
    ]
    print("+", " ".join(command[1:]), flush=True)
    if subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}).returncode:
        raise SystemExit(f"{folder}: the run failed; what it printed says why")
    (folder / "finished").touch()


def figures(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """A run's first and last evaluation, the last with its `s/step`, `GiB` and minutes in all."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evals = [
        {key.split("/", 2)[2]: value for key, value in row.items() if key.startswith("eval/")}
        for row in rows
        if "time/eval" in row
    ]
    steps = [row for row in rows if "time/step" in row]
    own = {
        "s/step": statistics.median(row["time/step"] for row in steps[1:] or steps),
        "s/rollout": statistics.median(row["time/rollout"] for row in steps[1:] or steps),
        "GiB": max(row["perf/peak_memory_gib"] for row in steps),
        "minutes": (
            sum(row["time/step"] for row in steps) + sum(row.get("time/eval", 0) for row in rows)
        )
        / 60,
    }
    return (evals or [{}])[0], (evals or [{}])[-1] | own


def cell(mean: float, deviation: float | None = None) -> str:
    """Mean ± standard deviation, to three digits of the mean."""
    digits = 1 if abs(mean) >= 10 else 3 if abs(mean) < 3 else 2
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation, None of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown, a line per setting; figures that a run does not have stay empty."""
    columns = list(dict.fromkeys(key for runs in rows.values() for run in runs for key in run))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, runs in rows.items():
        cells = [
            cell(*spread([run[key] for run in runs])) if all(key in run for run in runs) else ""
            for key in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_curves(runs: list[dict]) -> dict:
    """One of several curves.json: means, and standard deviations as `FIGURE_sd`; None where a run
    has none. Policies that not all have are left out. Raises SystemExit: they are of other data."""
    head = {
        key: value for key, value in runs[0].items() if key not in ("model", "measured", "policies")
    }
    if any(run.get(key) != runs[0].get(key) for run in runs for key in (*head, "measured")):
        raise SystemExit(
            "the runs' curves.json are of different data; measure them alike with scripts.curves"
        )
    policies = {}
    for policy, points in runs[0]["policies"].items():
        if any(len(run["policies"].get(policy, ())) != len(points) for run in runs):
            continue
        policies[policy] = []
        for place, point in enumerate(points):
            made = {}
            for figure in point:
                values = [run["policies"][policy][place][figure] for run in runs]
                made[figure], deviation = (None, None) if None in values else spread(values)
                if deviation is not None and figure not in ("setting", "quantile"):
                    made[f"{figure}_sd"] = deviation
            policies[policy].append(made)
    return head | {"runs": len(runs), "policies": policies}


def curve_table(name: str, curves: dict) -> str:
    """Markdown, a line per point of what `mean_curves` gives."""
    figures = ("bleu", "chrf", "exact", "al", "laal", "rco", "ail")
    lines = [
        f"| {name} | setting | " + " | ".join(figures) + " |",
        "|---" * (len(figures) + 2) + "|",
    ]
    for policy, points in curves["policies"].items():
        for point in points:
            cells = [
                "" if point[f] is None else cell(point[f], point.get(f"{f}_sd")) for f in figures
            ]
            lines.append(
                f"| {policy} | {point.get('quantile', point['setting']):g} | "
                + " | ".join(cells)
                + " |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.seeds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("settings", nargs="+", metavar="NAME: OVERRIDES")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    settings = {
        name.strip(): overrides.split()
        for name, _, overrides in (s.partition(":") for s in args.settings)
    }
    for name, overrides in settings.items():
        if not overrides:
            parser.error(f"'{name}' is not NAME: OVERRIDES")
    folders = {
        name: [args.out.resolve() / f"{name.replace(' ', '-')}-{seed}" for seed in args.seeds]
        for name in settings
    }
    for place, seed in enumerate(args.seeds):
        for name, overrides in settings.items():
            run(folders[name][place], overrides, seed)
    found = {name: [figures(folder) for folder in runs] for name, runs in folders.items()}
    starts = [first for runs in found.values() for first, _ in runs if first]
    rows = {"start": starts} if starts else {}
    for name, runs in folders.items():
        if all((folder / "curves.json").exists() for folder in runs):
            curves = mean_curves(
                [json.loads((folder / "curves.json").read_text()) for folder in runs]
            )
            mean = args.out / name.replace(" ", "-") / "curves.json"
            mean.parent.mkdir(exist_ok=True)
            mean.write_text(json.dumps(curves, indent=1))
            print(curve_table(name, curves) + "\n")
    print(table(rows | {name: [last for _, last in runs] for name, runs in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
