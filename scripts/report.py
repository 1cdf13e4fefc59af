"""Turn a run directory into `report.html`, one file that opens without a network.

`python -m scripts.report RUN_DIR [OTHER_DIR ...]`: with others, the report in RUN_DIR compares
them. It reads `metrics.jsonl`, `completions.jsonl`, `config.yaml` and `curves.json`; what is
missing or cannot be read is left out. A line of metrics that is not JSON (the last one of a killed
run) is skipped and counted; a value that is null, NaN or infinite is a gap in its curve; of a step
logged twice (a resumed run) the last value counts. `report.html.j2` holds markup and style.
matplotlib and jinja2 load in the functions that need them."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recipes.errors import DataError
from rollouts.data.marks import TOKENS

PHASES = ("rollout", "annotate", "update", "sync", "other")
WIDTH, WIDE, HEIGHT = 580, 1208, 232  # of a plot, CSS pixels
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 8, 38  # margins around its axes, CSS pixels
# completions shown per step; tokens or characters shown of each
SAMPLES, MAX_TOKENS, MAX_CHARS = 4, 800, 6000
# Curves are drawn in stand-in colours that become CSS variables, so the page's light and dark
# themes recolour them.
COLORS = {
    name: f"#0203{i:02x}"
    for i, name in enumerate("muted grid card s1 s2 s3 c1 c2 c3 c4 c5 c6 c7 c8".split())
}
DASHES = ("-", (0, (4, 2)), (0, (1.2, 1.6)), (0, (6, 1.5, 1.2, 1.5)))
# of rollouts and of held-out data, in one card
ALIKE = ("length_mean", "truncated_frac", "efficiency", "skip_frac")
LABELS = {
    **{f"rollout/{name}": "rollouts" for name in ALIKE},
    "mismatch/logp_abs_mean": "|Δ log p|",
}
# of curves
FIGURES = {"chrf": "chrF"} | {
    name: name.upper() for name in ("bleu", "f1", "rco", "ail", "al", "laal")
}
# of the streaming protocol, in HTML
MARKS = re.compile("|".join(TOKENS).replace("<", "&lt;").replace(">", "&gt;"))


@dataclass(eq=False)
class Run:
    """What one run directory holds. `series`: metric name -> (steps [N], values [N]), NaN where
    there is a gap."""

    path: Path
    recipe: str
    config: dict  # dotted key -> value
    config_text: str
    series: dict[str, tuple[np.ndarray, np.ndarray]]
    # step, bin starts (tokens or bin numbers), mean token rewards
    positions: list[tuple[int, np.ndarray, np.ndarray]]
    samples: list[tuple[int, list[dict]]]  # step, its rows of completions.jsonl
    skipped: int  # unreadable lines of metrics.jsonl
    # curves.json: {"data", "quality", "lag", "policies": {name: [point: setting and figures, ...]}}
    curves: dict
    label: str = ""


@dataclass
class Line:
    """One curve: x [N] (steps or tokens), y [N] with NaN for a gap, `band` [N] a half-width around
    y."""

    label: str
    color: str
    x: np.ndarray
    y: np.ndarray
    dash: int = 0  # of DASHES
    smooth: bool = False  # raw points faint, a moving average over them
    band: np.ndarray | None = None


def _number(value) -> float | None:
    """A finite float, NaN for a gap (null, NaN, infinite), None where it is no scalar."""
    if value is None or value in ("NaN", "Infinity", "-Infinity"):
        return math.nan
    return (
        (float(value) if abs(value) < 1e300 else math.nan)
        if isinstance(value, (int, float))
        else None
    )


def _numbers(values) -> np.ndarray:
    """A list as an array [N], NaN for what is no number; empty where it is no list."""
    return np.array(
        [math.nan if (n := _number(v)) is None else n for v in values]
        if isinstance(values, list)
        else [],
        float,
    )


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file


def _rows(lines: Iterable[str]) -> Iterator[dict | None]:
    """The JSON objects of some lines, None for a line that is not one."""
    for line in filter(str.strip, lines):
        row = None
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
        yield row if isinstance(row, dict) else None


def _spread(items: list) -> list:
    """The first, middle and last item, each once."""
    return [items[i] for i in sorted({0, len(items) // 2, len(items) - 1})] if items else []


def _flat(node, prefix: str = "") -> dict:
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


def read_run(path: Path) -> Run:
    """Read a run directory; a file that is not there is read as empty."""
    import yaml

    values, positions, skipped = defaultdict(dict), {}, 0
    for row in _rows(_lines(path / "metrics.jsonl")):
        step = None if row is None else _number(row.get("step", ""))
        if step is None or math.isnan(step):
            skipped += 1
            continue
        bins = _numbers(row.get("reward/by_position"))
        starts = _numbers(row.get("reward/by_position_bins"))[: len(bins)]
        if np.isfinite(bins).any():
            positions[int(step)] = (
                starts if np.isfinite(starts).sum() == len(bins) else 1.0 * np.arange(len(bins)),
                bins,
            )
        for key, value in row.items():
            if key != "step" and (number := _number(value)) is not None:
                values[key][step] = number
    series = {
        key: (np.array(sorted(points)), np.array([points[s] for s in sorted(points)]))
        for key, points in values.items()
        if np.isfinite(list(points.values())).any()
    }
    file, step_of = (
        path / "completions.jsonl",
        lambda line: int(m[1]) if (m := re.search(r'"step": *(\d+)', line)) else -1,
    )
    shown = _spread(
        sorted({step_of(line) for line in _lines(file) if line.rstrip().endswith("}")} - {-1})
    )
    # the others are not parsed
    rows = [row for row in _rows(line for line in _lines(file) if step_of(line) in shown) if row]
    samples = [
        (step, found[:SAMPLES])
        for step in shown
        if (found := [row for row in rows if row.get("step") == step])
    ]
    text, config = "".join(_lines(path / "config.yaml")), {}
    with contextlib.suppress(yaml.YAMLError, ValueError):
        config = _flat(yaml.safe_load(text))
    return Run(
        path,
        str(config.get("recipe") or path.resolve().name),
        config,
        text,
        series,
        [(step, *positions[step]) for step in sorted(positions)],
        samples,
        skipped,
        next(_rows(["".join(_lines(path / "curves.json"))]), None) or {},
    )


def short(value, unit: str = "", digits: int = 3) -> str:
    """A number in significant digits, `%` for a share in 0..1, other units after it; what is no
    number as its text."""
    if (number := _number(value)) is None:
        return str(value)
    if math.isnan(number):
        return "–"
    if unit == "%":
        return (f"{100 * number:.1f}%" if digits == 3 else f"{100 * number:.{digits}g}%").replace(
            "-", "−"
        )
    scale, suffix = next(
        ((s, t) for s, t in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if abs(number) >= 10 * s), (1, "")
    )
    number /= scale
    text = f"{number:.0f}" if 100 <= abs(number) and digits == 3 else f"{number:.{digits}g}"
    return (re.sub(r"e([-+])0*", r"e\1", text).replace("-", "−") + suffix + f" {unit}").strip()


def _smoothed(y: np.ndarray, log: bool = False) -> np.ndarray:
    """Centred moving average of y [N] over a 25th of the series (of log y on a log axis); gaps stay
    gaps."""
    ok = np.isfinite(y)
    z = np.where(ok, np.log(np.where(ok, y, 1.0)) if log else y, 0.0)
    window = np.ones(2 * (len(y) // 50) + 1)
    mean = np.convolve(z, window, "same") / np.maximum(np.convolve(ok, window, "same"), 1)
    return np.where(ok, np.exp(mean) if log else mean, math.nan)


def _thinned(y: np.ndarray, bins: int = 300) -> list[int]:
    """Indices of the lowest and highest value of each bin of y [N], or of a gap in it; all of a
    short series."""
    size = max(1, len(y) // bins)
    return sorted(
        {
            start + of(y[start : start + size])
            for start in range(0, len(y), size)
            for of in (np.argmin, np.argmax)
        }
    )


def _card(
    title: str,
    lines: list[Line],
    keys: list[str],
    wide: bool,
    unit: str = "",
    log: bool = False,
    note: str = "",
    x_label: str = "optimizer step",
    stack: bool = False,
    bins: bool = False,
) -> dict:
    """Draw the lines and return what the template shows: the SVG, a legend with last values, the
    tooltip's numbers."""
    from markupsafe import Markup
    from matplotlib import ticker
    from matplotlib.figure import Figure

    width = WIDE if wide else WIDTH
    figure = Figure(figsize=(width / 72, HEIGHT / 72), dpi=72)
    ax = figure.add_axes(
        box := (
            LEFT / width,
            BOTTOM / HEIGHT,
            1 - (LEFT + RIGHT) / width,
            1 - (TOP + BOTTOM) / HEIGHT,
        )
    )
    ax.set_yscale("log" if log else "linear")
    if stack:
        pick = _thinned(sum(line.y for line in lines))
        ax.stackplot(
            lines[0].x[pick],
            [line.y[pick] for line in lines],
            colors=[COLORS[line.color] for line in lines],
            alpha=0.85,
            linewidth=0.6,
            edgecolor=COLORS["card"],
        )
        total = np.nan_to_num(sum(line.y for line in lines))
        if total.max() > 3 * (usual := np.percentile(total, 97)) > 0:
            ax.set_ylim(0, 1.25 * usual)
            note = f"{short(total.max(), unit)} at step {lines[0].x[total.argmax()]:.0f} is off the scale"
    for line in [] if stack else lines:
        y = np.where(line.y > 0, line.y, math.nan) if log else line.y
        smooth, color = line.smooth and np.isfinite(y).sum() >= 30, COLORS[line.color]
        curve, pick = _smoothed(y, log) if smooth else y, _thinned(y)
        if line.band is not None:
            band = _smoothed(line.band) if smooth else line.band
            ax.fill_between(
                line.x[pick],
                (curve - band)[pick],
                (curve + band)[pick],
                color=color,
                alpha=0.13,
                linewidth=0,
            )
        if smooth:
            ax.plot(line.x[pick], y[pick], color=color, alpha=0.3, linewidth=0.9)
        marker = (
            {"marker": "o", "markersize": 6, "markeredgecolor": COLORS["card"]}
            if len(line.x) <= 40
            else {}
        )
        ax.plot(
            line.x[pick],
            curve[pick],
            color=color,
            linewidth=2,
            linestyle=DASHES[line.dash % len(DASHES)],
            **marker,
        )
    ax.margins(x=0.012)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if log:
        ax.yaxis.set_minor_locator(ticker.NullLocator())
        decades = math.log10(ax.get_ylim()[1] / ax.get_ylim()[0])
        few = (
            ticker.MaxNLocator(4)
            if decades < 0.8
            else ticker.LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=7)
        )
        ax.yaxis.set_major_locator(few)
    elif unit == "%":
        ax.set_ylim(max(ax.get_ylim()[0], -0.02), min(ax.get_ylim()[1], 1.02))
    percent = unit if unit == "%" else ""
    for axis, of in ((ax.xaxis, ""), (ax.yaxis, percent)):
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _, of=of: short(value, of, 5)))
    ax.set_xlabel(x_label, labelpad=4)
    figure.savefig(buffer := io.StringIO(), format="svg", transparent=True)
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    for pattern, new in (
        ("<metadata>.*?</metadata>|<!--.*?-->", ""),
        (r' id="\w+_\d+"| xmlns(:xlink)?="[^"]*"', ""),
        ("xlink:href", "href"),
        (r'font: ([\d.]+px)[^;"]*', r"font-size: \1"),
        (r'(?<=[ "(,\n-])\d+\.\d{2,}', lambda m: f"{float(m[0]):.1f}"),
        ("#0203([0-9a-f]{2})", lambda m: f"var(--{list(COLORS)[int(m[1], 16)]})"),
    ):
        svg = re.sub(pattern, new, svg, flags=re.S)
    thin = lambda line, a, n: [
        float(f"{v:.{n}g}") if math.isfinite(v) else None for v in a[_thinned(line.y)]
    ]
    hover = {
        "box": [box[0], TOP / HEIGHT, box[2], box[3]],
        "xlim": ax.get_xlim(),
        "ylim": ax.get_ylim(),
        "log": log,
        "unit": unit,
        "x": x_label.removeprefix("optimizer "),
        "dots": not stack,
        "lines": [
            {
                "name": line.label,
                "color": line.color,
                "x": thin(line, line.x, 9),
                "y": thin(line, line.y, 4),
            }
            for line in lines
        ],
    }
    last = lambda y: short(y[np.isfinite(y)][-1], percent)
    return {
        "title": title,
        "keys": keys,
        "note": note,
        "wide": wide,
        "svg": Markup(svg),
        "hover": hover,
        "unit": ", ".join(filter(None, (unit.replace("%", ""), "log scale" if log else ""))),
        "legend": [
            (line.label, line.color, line.dash % len(DASHES), "" if bins else last(line.y))
            for line in lines
        ],
    }


def _curves(
    runs: list[Run],
    title: str,
    wants: tuple[str, ...],
    unit: str = "",
    log: str = "",
    band: str = "",
) -> dict | None:
    """The arguments of `_card` for some metrics; one that ends in @ is a prefix, `band` names a
    half-width. `log`: "auto" where values span over a decade, "yes" where any is positive. Colour
    is the metric, or the run if there are several."""
    many, lines = len(runs) > 1, []
    keys = list(
        dict.fromkeys(
            k
            for want in wants
            for run in runs
            for k in sorted(run.series)
            if k == want or want.endswith("@") and k.startswith(want)
        )
    )
    for r, run in enumerate(runs):
        for i, key in ((i, key) for i, key in enumerate(keys) if key in run.series):
            (x, y), prefix, last = run.series[key], *key.rsplit("/", 1)
            half = dict(zip(*run.series[band])) if band in run.series else None
            held_out = f"held-out {prefix[5:]}" if last in ALIKE else last.replace("_", " ")
            label = " ".join(
                [run.label] * many + [LABELS.get(key, held_out)] * (len(keys) > 1 or not many)
            )
            lines.append(
                Line(
                    label,
                    f"c{(r if many else i) % 8 + 1}",
                    x,
                    y,
                    i * many,
                    prefix[:4] not in ("eval", "time"),
                    None if half is None else np.array([half.get(s, math.nan) for s in x]),
                )
            )
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines] or [[]])
    return (
        {
            "title": title,
            "lines": lines,
            "keys": keys,
            "unit": "" if unit == "%" and values.max() > 1.001 else unit,
            "log": bool(
                log == "yes"
                and values.max() > 0
                or log == "auto"
                and values.max() > 10 * values.min() > 0
            ),
        }
        if lines
        else None
    )


def _path(runs: list[Run], title: str, data: str) -> dict | None:
    """Held-out accuracy over mean length: one point per evaluation, joined in the order of the
    steps."""
    lines, ends = [], []
    for r, run in enumerate(runs):
        accuracy = next((k for k in sorted(run.series) if k.startswith(f"eval/{data}/avg@")), None)
        if accuracy is None or f"eval/{data}/efficiency" not in run.series:
            continue
        length = dict(zip(*run.series[f"eval/{data}/length_mean"]))
        steps, y = run.series[accuracy]
        x = np.array([length.get(step, math.nan) for step in steps])
        lines.append(
            Line(
                run.label if len(runs) > 1 else accuracy.rpartition("/")[2],
                f"c{r % 8 + 1}",
                x,
                y,
                r,
            )
        )
        ends.append(
            f"{run.label + ': ' if len(runs) > 1 else ''}step {steps[0]:.0f} at {short(x[0])} tokens, "
            f"step {steps[-1]:.0f} at {short(x[-1])}"
        )
    return (
        {
            "title": title,
            "lines": lines,
            "unit": "%",
            "x_label": "mean length, tokens",
            "keys": [f"eval/{data}/avg@k", f"eval/{data}/length_mean"],
            "note": "; ".join(ends),
        }
        if lines
        else None
    )


def _by_position(runs: list[Run]) -> dict | None:
    """Mean token reward along the completion: first, middle and last logged step (of several runs,
    first and last)."""
    lines, many = [], len(runs) > 1
    for r, run in enumerate(runs):
        picks = (run.positions[:1] + run.positions[1:][-1:]) if many else _spread(run.positions)
        lines += [
            Line(
                f"{run.label} " * many + f"step {step}",
                f"c{r % 8 + 1}" if many else f"s{3 - back}",
                x,
                y,
                back * many,
            )
            for back, (step, x, y) in zip(range(len(picks))[::-1], picks)
        ]
    unknown = all(np.array_equal(line.x, np.arange(len(line.x))) for line in lines)
    return (
        {
            "title": "Reward by position",
            "lines": lines,
            "keys": ["reward/by_position"],
            "bins": True,
            "x_label": "position bin" if unknown else "position in the completion, tokens",
        }
        if lines
        else None
    )


def _policies(runs: list[Run]) -> list[dict]:
    """The cards of `curves.json`: quality over lag, a line per policy, and a table of the figures;
    runs share a card where their data, quality and lag are the same. A point without its lag is in
    the table only."""
    from markupsafe import Markup

    groups, cards, many = defaultdict(list), [], len(runs) > 1
    for r, run in enumerate(runs):
        usual = {"data": "", "quality": "bleu", "lag": "al"}
        axes = tuple(str(run.curves.get(key) or usual[key]) for key in usual)
        policies = run.curves.get("policies")
        for i, (policy, points) in enumerate(
            policies.items() if isinstance(policies, dict) else ()
        ):
            points = (
                [point for point in points if isinstance(point, dict)]
                if isinstance(points, list)
                else []
            )
            groups[axes].append(
                (
                    f"{run.label} " * many + policy,
                    f"c{(r if many else i) % 8 + 1}",
                    i * many,
                    points,
                )
            )
    for (data, quality, lag), policies in groups.items():
        lines, rows = [], []
        for policy, color, dash, points in policies:
            x, y = (_numbers([point.get(key) for point in points]) for key in (lag, quality))
            order = np.argsort(x, kind="stable")  # NaN last
            rows += [(policy, color, points[i]) for i in order]
            placed = order[np.isfinite(x[order])]
            if np.isfinite(y[placed]).any():
                # digits of the tooltip
                lines.append(Line(policy, color, x[placed].round(3), y[placed], dash))
        if not lines:
            continue
        name = lambda key: FIGURES.get(key, key.replace("_", " "))
        card = _card(
            "Latency and quality" + f" · {data}" * bool(data),
            lines,
            ["curves.json"],
            True,
            name(quality),
            x_label=name(lag) + ", source units" * (lag != "rco"),
            bins=True,
        )
        if len(lines) == 1:
            card["legend"] = [(*card["legend"][0][:3], lines[0].label)]  # shown alone
        cell = Markup("<td>{}</td>").format
        columns = {"setting": [cell(short(point.get("setting"), digits=4)) for *_, point in rows]}
        for key in dict.fromkeys([lag, quality, *(key for *_, point in rows for key in point)]):
            numbers = _numbers([point.get(key) for *_, point in rows])
            if np.isfinite(numbers).any() and key not in columns:
                digits = 3 if np.nanmax(abs(numbers)) <= 1 else 2
                columns[key] = [
                    cell(f"{v:.{digits}f}".replace("-", "−").replace("nan", "–")) for v in numbers
                ]
        row = Markup(
            '<tr><th><span class="dot" style="--k: var(--{})"></span>{}</th>{}</tr>'
        ).format
        # The template ends the plot's element after the SVG: here the plot ends first, then the
        # template the table's.
        card["svg"] += Markup(
            '</div><div class="scroll"><table style="min-width: {}px"><thead><tr><th>policy</th>{}'
            "</tr></thead><tbody>{}</tbody></table>"
        ).format(
            250 + 90 * len(columns),
            Markup().join(Markup("<th>{}</th>").format(name(key)) for key in columns),
            Markup().join(
                row(color, policy, Markup().join(cells))
                for (policy, color, _), cells in zip(rows, zip(*columns.values()))
            ),
        )
        cards.append(card)
    return cards


def _phases(run: Run) -> list[Line]:
    """Seconds per phase and step; `other` is the rest of time/step, where that is over 1 %."""
    times = {
        name: dict(zip(*run.series[f"time/{name}"]))
        for name in (*PHASES, "step")
        if f"time/{name}" in run.series
    }
    total = times.pop("step", None)
    steps = np.array(sorted(set().union(*times.values())))
    rows = {name: np.array([points.get(s, 0.0) for s in steps]) for name, points in times.items()}
    if rows and total:
        rest = np.maximum(np.array([total.get(s, math.nan) for s in steps]) - sum(rows.values()), 0)
        if np.nansum(rest) > 0.01 * np.nansum(list(total.values())):
            rows["other"] = rows.get("other", 0) + np.nan_to_num(rest)
    return [Line(name, f"c{PHASES.index(name) + 1}", steps, y) for name, y in rows.items()]


def _cards(runs: list[Run]) -> list[dict]:
    """Every card of the curves section, in reading order; the last is wide if an odd number follows
    the policies'."""
    data = sorted(
        {m[1] for run in runs for key in run.series if (m := re.match(r"eval/(.+)/[^/]+$", key))}
    )
    held_out = lambda metric: tuple(f"eval/{name}/{metric}" for name in data)
    per_data = lambda title, unit, *metrics: [
        _curves(
            runs,
            title + (f" · {name}" if len(data) > 1 else ""),
            tuple(f"eval/{name}/{m}" for m in metrics),
            unit,
        )
        for name in data
    ]
    phases = _phases(runs[0]) if len(runs) == 1 else []
    found = [
        card
        for card in [
            *per_data("Held-out accuracy", "%", "avg@", "pass@"),
            *(
                _path(runs, "Accuracy and length" + (f" · {name}" if len(data) > 1 else ""), name)
                for name in data
            ),
            _curves(runs, "Training accuracy", ("reward/accuracy",), "%"),
            _curves(runs, "Reward, mean ± std", ("reward/mean",), band="reward/std"),
            _by_position(runs),
            _curves(
                runs, "Response length", ("rollout/length_mean", *held_out("length_mean")), "tokens"
            ),
            _curves(
                runs,
                "Efficiency, % accuracy per token",
                ("rollout/efficiency", *held_out("efficiency")),
            ),
            _curves(
                runs,
                "Truncated share",
                ("rollout/truncated_frac", *held_out("truncated_frac")),
                "%",
            ),
            _curves(runs, "Kept samples", ("rollout/kept_frac",), "%"),
            _curves(runs, "Prompts with no kept sample", ("rollout/prompts_with_none",), "prompts"),
            _curves(runs, "Clipped share", ("policy/clip_frac",), "%"),
            _curves(runs, "KL to the starting weights", ("reference/kl",), "nats"),
            *per_data("Share of the input read (RCO)", "%", "rco"),
            *per_data("Lag behind the stream", "", "ail", "al", "laal"),
            _curves(runs, "Format and thinking rewards", ("reward/format", "reward/thinking")),
            _curves(
                runs,
                "Streaming and deep length",
                ("rollout/streaming_length_mean", "rollout/deep_length_mean"),
                "tokens",
            ),
            *per_data(
                "Held-out streaming and deep length",
                "tokens",
                "streaming_length_mean",
                "deep_length_mean",
            ),
            _curves(runs, "Skipped share", ("rollout/skip_frac", *held_out("skip_frac")), "%"),
            *per_data("Latency", "s", "latency_s"),
            _curves(runs, "Gradient norm", ("train/grad_norm",), log="auto"),
            _curves(runs, "Loss", ("train/loss",)),
            _curves(runs, "KL to the teacher", ("teacher/kl",), "nats"),
            _curves(runs, "Agreement with the teacher", ("teacher/agreement",), "%"),
            _curves(
                runs,
                "Trainer against sampler",
                ("mismatch/logp_abs_mean", "mismatch/kl"),
                "nats",
                log="yes",
            ),
            _curves(runs, "Effective sample size", ("mismatch/ess",), "%"),
            _curves(runs, "Entropy", ("rollout/entropy",), "nats"),
            _curves(runs, "Throughput", ("perf/tokens_per_second",), "tokens/s"),
            {
                "title": "Time per step",
                "lines": phases,
                "keys": ["time/*"],
                "unit": "s",
                "stack": True,
            }
            if phases
            else _curves(runs, "Time per step", ("time/step",), "s"),
        ]
        if card
    ]
    return _policies(runs) + [
        _card(wide=len(found) % 2 == 1 and card is found[-1], **card) for card in found
    ]


def _spark(x: np.ndarray, y: np.ndarray, low: float, high: float, left: float, right: float) -> str:
    """An SVG path in a box of 100 by 30, y between low and high, x between left and right; gaps
    break it."""
    pick = _thinned(y, 75)
    u, v = (
        100 * (x[pick] - left) / ((right - left) or 1),
        28 - 26 * (y[pick] - low) / ((high - low) or 1),
    )
    ok = np.isfinite(v)
    return "".join(
        f"{'L' if i and ok[i - 1] else 'M'}{u[i]:.1f} {v[i]:.1f}" for i in np.flatnonzero(ok)
    )


def _tiles(run: Run) -> list[dict]:
    """The summary: name, value in `unit` (or before and value, and which sign of the change is
    good), a line about it."""
    ends = lambda metric: [k for k in sorted(run.series) if re.match(f"eval/.+/{metric}$", k)]
    phases = " · ".join(f"{line.label} {short(np.nanmean(line.y))}" for line in _phases(run))
    memory = [
        short(np.nanmax(run.series[k][1]), "GiB at the peak")
        for k in ("perf/peak_memory_gib",)
        if k in run.series
    ]
    avg = ends("avg@[^/]+")
    accuracy = [
        ("Accuracy" + (f" · {key[5:].rpartition('/')[0]}" if len(avg) > 1 else ""), [key], "%", 1)
        for key in avg[:2] or ["reward/accuracy"]
    ]
    tiles = []
    for name, keys, unit, about in [  # `about` of a change: the sign that is good
        *accuracy,
        ("Mean length", [*ends("length_mean"), "rollout/length_mean"], "tokens", 0),
        ("Truncated", [*ends("truncated_frac"), "rollout/truncated_frac"], "%", -1),
        ("Latency", ends("latency_s"), "s", -1),
        ("Gradient norm, median", ["train/grad_norm"], "", "before clipping"),
        ("Step time, median", ["time/step"], "s", phases),
        ("Tokens per second, median", ["perf/tokens_per_second"], "", "".join(memory)),
    ]:
        key = next((key for key in keys if key in run.series), None)
        if key is None:
            continue
        x, y = (a[np.isfinite(run.series[key][1])] for a in run.series[key])
        curve = _smoothed(y)
        tile = {
            "name": name,
            "unit": "" if unit == "%" and y.max() > 1.001 else unit,
            "about": about,
            "value": np.median(y),
            "spark": len(y) > 1 and _spark(x, curve, curve.min(), curve.max(), x[0], x[-1]),
        }
        if isinstance(about, int):
            # steps averaged at either end
            edge = 1 if key.startswith("eval/") else max(1, len(y) // 20)
            steps = f"step {x[0]:.0f} → {x[-1]:.0f}" if edge == 1 else f"first → last {edge} steps"
            tile |= {
                "about": f"{key}, {steps}",
                "good": about,
                "value": y[-edge:].mean(),
                "before": y[:edge].mean() if len(y) > edge else None,
            }
        tiles.append(tile)
    steps = set().union(*(set(x) for key, (x, _) in run.series.items() if key.startswith("train/")))
    planned, seconds = (
        run.config.get("train.steps"),
        round(np.nansum(run.series.get("time/step", [(), ()])[1])),
    )
    return tiles + [
        {
            "name": "Steps",
            "value": str(len(steps)),
            "unit": f"of {planned}" if planned else "",
            "about": f"{datetime.timedelta(seconds=seconds)} in steps" if seconds else "",
        }
    ] * bool(steps)


def _tokens(row: dict, scale: float) -> tuple[list, int]:
    """A completion as (text, class of its colour, reward) and what was cut off; a reward of
    ±`scale` has the full colour."""
    tokens, rewards, body = (
        row.get("tokens"),
        _numbers(row.get("token_rewards")),
        str(row.get("completion") or ""),
    )
    if not (isinstance(tokens, list) and len(tokens) == len(rewards) > 0):
        return [(body[:MAX_CHARS], "", None)], max(0, len(body) - MAX_CHARS)
    return [
        (
            str(token),
            ""
            if math.isnan(r)
            else f"{'p' if r > 0 else 'n'}{min(5, math.ceil(5 * abs(r) / scale))}",
            r,
        )
        for token, r in zip(tokens[:MAX_TOKENS], rewards)
    ], max(0, len(tokens) - MAX_TOKENS)


def _marked(text: str):
    """HTML in which the tokens of the streaming protocol stand out, each at the end of its line."""
    from markupsafe import Markup, escape

    return Markup(MARKS.sub(r'<b class="mark">\g<0></b>\n', str(escape(text))))


def write_report(run_dir: Path, *others: Path) -> Path:
    """Write `run_dir/report.html` and return its path; `others` are run directories to compare it
    with."""
    import jinja2
    import matplotlib

    runs = [read_run(Path(path)) for path in (run_dir, *others)]
    names = list(
        zip(
            *(
                (run.recipe, f"{run.recipe}/{run.path.resolve().name}", str(run.path))
                for run in runs
            )
        )
    )
    for run, label in zip(
        runs, next((some for some in names if len(set(some)) == len(runs)), names[-1])
    ):
        run.label = label
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "onstream",
                "font.size": 11,
                "axes.grid": True,
                "axes.grid.axis": "y",
                "axes.axisbelow": True,
                **dict.fromkeys(
                    ("axes.spines.left", "axes.spines.right", "axes.spines.top"), False
                ),
                **dict.fromkeys(("grid.color", "axes.edgecolor"), COLORS["grid"]),
                **dict.fromkeys(("xtick.color", "ytick.color", "axes.labelcolor"), COLORS["muted"]),
                **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
            }
        )
        cards = _cards(runs)
    groups = defaultdict(list)  # every metric as a small curve, by prefix
    for key in sorted({key for run in runs for key in run.series}):
        found = [
            (f"c{r % 8 + 1}", *run.series[key]) for r, run in enumerate(runs) if key in run.series
        ]
        limits = [
            f(f(xy[i][np.isfinite(xy[i])]) for _, *xy in found) for i in (1, 0) for f in (min, max)
        ]
        groups[key.rpartition("/")[0] or "other"].append(
            {
                "name": key.rpartition("/")[2],
                "low": limits[0],
                "high": limits[1],
                "paths": [(color, _spark(x, y, *limits)) for color, x, y in found],
                "last": [(color, y[np.isfinite(y)][-1]) for color, _, y in found],
            }
        )
    shown = [row for run in runs for _, rows in run.samples for row in rows]
    rewards = np.array([reward for row in shown for reward in _numbers(row.get("token_rewards"))])
    scale = (
        float(np.percentile(np.abs(rewards[np.isfinite(rewards)]), 98))
        if np.isfinite(rewards).any()
        else 0.0
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    environment.filters |= {"short": short, "marked": _marked}
    page = environment.get_template("report.html.j2").render(
        runs=runs,
        tiles=[_tiles(run) for run in runs],
        cards=cards,
        groups=groups,
        scale=scale,
        limit=MAX_CHARS,
        tokens=lambda row: _tokens(row, scale or 1.0),
        hover=[card["hover"] for card in cards],
    )
    partial = Path(run_dir) / f".report.{os.getpid()}.html"
    partial.write_bytes(page.encode("utf-8", "replace"))
    return partial.replace(Path(run_dir) / "report.html")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m scripts.report", description="Write RUN_DIR/report.html."
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        nargs="+",
        help="a run directory; further ones are compared with the first",
    )
    folders = parser.parse_args(arguments).run_dir
    try:
        known = lambda folder: any(
            (folder / name).is_file() for name in ("metrics.jsonl", "curves.json")
        )
        if empty := [folder for folder in folders if not known(folder)]:
            raise DataError(
                f"{empty[0]}: no metrics.jsonl here; give a run directory (run.dir of a training run)"
            )
        print(write_report(*folders))
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
