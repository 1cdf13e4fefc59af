"""The charts of a report: which there are, and the numbers of each.

A card is one chart with its title and legend. `CHARTS` lists them in reading order; one whose
metrics were not logged is left out. `charts.js` draws what `Card.plot` returns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from scripts.report.directory import Run, spread
from scripts.report.numbers import finite, rounded, short, smoothed, thinned

PHASES = ("rollout", "annotate", "update", "sync")
FEWEST_SMOOTHED = 30  # a shorter curve is drawn as it is
# Metrics that rollouts and held-out data have in common: they share a card.
SHARED = ("length_mean", "truncated_frac", "efficiency", "skip_frac")
LABELS = {"mismatch/logp_abs_mean": "|Δ log p|"}


def palette(index: int) -> str:
    """The page's colour of the run, the metric or the policy with this index."""
    return f"c{index % 8 + 1}"


@dataclass
class Line:
    """One curve. Its arrays are [N], with NaN for a gap."""

    label: str
    color: str  # a CSS variable of the page
    x: np.ndarray  # steps, tokens or lag
    y: np.ndarray
    dash: int = 0
    trend: np.ndarray | None = None  # a moving average, drawn over the faint y
    low: np.ndarray | None = None  # of a band around the curve
    high: np.ndarray | None = None  # without `low`: of an area that begins at zero
    note: str = ""

    def plot(self, bins: int = 300, kept: np.ndarray | None = None) -> dict:
        """The curve as JSON.

        Args:
            bins: of at most two points each.
            kept: indices of the points to show; None: chosen by the curve's own values.
        """
        if kept is None:
            kept = thinned(self.y, bins)
        plot = {"name": self.label, "color": self.color, "dash": self.dash}
        plot["x"] = rounded(self.x[kept], digits=9)
        for name in ("y", "trend", "low", "high"):
            values = getattr(self, name)
            if values is not None:
                plot[name] = rounded(values[kept], digits=4)
        return plot

    def last(self, unit: str = "") -> str:
        return short(finite(self.y)[-1], "%" if unit == "%" else "")


@dataclass
class Card:
    """One chart, and what the page writes around it."""

    title: str
    lines: list[Line]
    keys: list[str]  # the metrics, named when the title is pointed at
    unit: str = ""  # `%` is for a share in 0..1
    x_label: str = "optimizer step"
    log: bool = False
    top: float | None = None  # the end of the vertical axis, where the data do not set it
    note: str = ""
    last_values: bool = True  # the legend shows the last value of each line
    wide: bool = False
    table: dict = field(default_factory=dict)  # of policies: its columns and rows

    def plot(self, bins: int = 300) -> dict:
        """What `charts.js` draws."""
        # Areas that are stacked keep the same points, else the layers would not add up.
        stacked = all(line.high is not None and line.low is None for line in self.lines)
        kept = thinned(self.lines[-1].high, bins) if stacked else None
        return {
            "unit": self.unit,
            "log": self.log,
            "top": self.top,
            "x": self.x_label.removeprefix("optimizer ").partition(",")[0],
            "lines": [line.plot(bins, kept) for line in self.lines],
        }

    def values(self) -> np.ndarray:
        return np.concatenate([finite(line.y) for line in self.lines])


@dataclass(frozen=True)
class Chart:
    """A card of logged metrics.

    In the metrics, {data} stands for every held-out data set, and a final @ for every k. Where all
    metrics are of held-out data, every data set has a card of its own.
    """

    title: str
    metrics: str
    unit: str = ""
    log: str = ""  # auto: where values span over a decade; yes: where any is positive
    band: str = ""  # the metric that is half the width of a band around the curve

    def __call__(self, runs: list[Run]) -> list[Card]:
        data = held_out(runs)
        if all("{data}" in metric for metric in self.metrics.split()):
            cards = [self._card(runs, titled(self.title, name, data), [name]) for name in data]
        else:
            cards = [self._card(runs, self.title, data)]
        return [card for card in cards if card]

    def _card(self, runs: list[Run], title: str, data: list[str]) -> Card | None:
        keys = self._keys(runs, data)
        lines = [
            self._line(runs, i, keys, j)
            for i, run in enumerate(runs)
            for j, key in enumerate(keys)
            if key in run.series
        ]
        if not lines:
            return None
        card = Card(title, lines, keys, self.unit)
        low, high = card.values().min(), card.values().max()
        if high > 1.001:
            # A score in points is no share.
            card.unit = self.unit.replace("%", "")
        wide = high > 10 * low > 0
        if (self.log == "auto" and wide) or (self.log == "yes" and high > 0):
            card.log = True
            for line in lines:
                line.trend = trend(line.y, log=True)
        return card

    def _keys(self, runs: list[Run], data: list[str]) -> list[str]:
        """The logged metrics, in the order of `metrics`."""
        logged = sorted({key for run in runs for key in run.series})
        keys: dict[str, None] = {}
        for metric in self.metrics.split():
            for name in data or [""]:
                wanted = metric.replace("{data}", name)
                prefix = wanted if wanted.endswith("@") else None
                keys |= dict.fromkeys(
                    key for key in logged if key == wanted or (prefix and key.startswith(prefix))
                )
        return list(keys)

    def _line(self, runs: list[Run], i: int, keys: list[str], j: int) -> Line:
        """The curve of metric j of run i. Its colour is the metric, or of several runs the run."""
        run, key = runs[i], keys[j]
        steps, values = run.series[key]
        label = "" if len(runs) > 1 and len(keys) == 1 else metric_label(key)
        line = among(runs, Line(label, palette(j), steps, values), i, dash=j)
        # An evaluation is an average already. Of seconds, the outliers are the news.
        if not key.startswith(("eval/", "time/")):
            line.trend = trend(values)
        if self.band in run.series:
            half = at_steps(run, self.band, steps)
            middle = values
            if line.trend is not None:
                middle, half = line.trend, smoothed(half)
            line.low = middle - half
            line.high = middle + half
        return line


def among(runs: list[Run], line: Line, i: int, dash: int) -> Line:
    """A line of run i: where there are several, the colour and the first word are the run's."""
    if len(runs) > 1:
        line.label = f"{runs[i].label} {line.label}".strip()
        line.color = palette(i)
        line.dash = dash
    return line


def trend(values: np.ndarray, log: bool = False) -> np.ndarray | None:
    """The moving average of the values, None for so few that they are drawn as they are."""
    if log:
        # The axis has no place for zero.
        values = np.where(values > 0, values, math.nan)
    return smoothed(values, log) if len(finite(values)) >= FEWEST_SMOOTHED else None


def held_out(runs: list[Run]) -> list[str]:
    """The names of the data sets that were evaluated on."""
    matches = [re.match(r"eval/(.+)/[^/]+$", key) for run in runs for key in run.series]
    return sorted({match[1] for match in matches if match})


def titled(title: str, name: str, data: list[str]) -> str:
    """The title, with the data set's name where there are several."""
    return f"{title} · {name}" if len(data) > 1 else title


def metric_label(key: str) -> str:
    prefix, _, name = key.rpartition("/")
    if name in SHARED:
        return "rollouts" if prefix == "rollout" else f"held-out {prefix.removeprefix('eval/')}"
    return LABELS.get(key, name.replace("_", " "))


def at_steps(run: Run, key: str, steps: np.ndarray) -> np.ndarray:
    """The values of a metric at the steps [N], NaN where it has none."""
    values = dict(zip(*run.series.get(key, ([], []))))
    return np.array([values.get(step, math.nan) for step in steps])


def accuracy_over_length(runs: list[Run]) -> list[Card]:
    """A card for every held-out data set: one point per evaluation, joined in their order."""
    data = held_out(runs)
    cards = []
    for name in data:
        lines = _accuracy_lines(runs, name)
        if lines:
            keys = [f"eval/{name}/avg@k", f"eval/{name}/length_mean"]
            card = Card(titled("Accuracy and length", name, data), lines, keys, "%")
            card.x_label = "mean length, tokens"
            card.note = "; ".join(line.note for line in lines)
            cards.append(card)
    return cards


def _accuracy_lines(runs: list[Run], name: str) -> list[Line]:
    lines = []
    for i, run in enumerate(runs):
        keys = [key for key in sorted(run.series) if key.startswith(f"eval/{name}/avg@")]
        if not keys or f"eval/{name}/efficiency" not in run.series:
            continue
        steps, y = run.series[keys[0]]
        x = at_steps(run, f"eval/{name}/length_mean", steps)
        label = "" if len(runs) > 1 else metric_label(keys[0])
        line = among(runs, Line(label, palette(i), x, y), i, dash=i)
        # The line does not show which of its ends is the first.
        start = f"step {steps[0]:.0f} at {short(x[0])} tokens"
        ends = f"{start}, step {steps[-1]:.0f} at {short(x[-1])}"
        line.note = f"{line.label}: {ends}" if len(runs) > 1 else ends
        lines.append(line)
    return lines


def reward_by_position(runs: list[Run]) -> list[Card]:
    """Mean token reward along the completion, of a few steps of each run."""
    lines = []
    for i, run in enumerate(runs):
        chosen = spread(run.positions)
        if len(runs) > 1:
            # With three steps of each, four runs would be twelve lines.
            chosen = chosen[:1] + chosen[1:][-1:]
        for age, (step, x, y) in zip(reversed(range(len(chosen))), chosen):
            line = Line(f"step {step}", f"s{3 - age}", x, y)
            lines.append(among(runs, line, i, age))
    if not lines:
        return []
    counted = all(np.array_equal(line.x, np.arange(len(line.x))) for line in lines)
    card = Card("Reward by position", lines, ["reward/by_position"], last_values=False)
    card.x_label = "position bin" if counted else "position in the completion, tokens"
    return [card]


def phases(run: Run) -> list[Line]:
    """Seconds of each phase of a step.

    What of time/step is in no phase is `other`, where it is over 1 % of the whole.
    """
    logged = [name for name in PHASES if f"time/{name}" in run.series]
    if not logged:
        return []
    steps = np.unique(np.concatenate([run.series[f"time/{name}"][0] for name in logged]))
    total = np.nan_to_num(at_steps(run, "time/step", steps))
    rest = total.copy()
    lines = []
    for name in logged:
        seconds = np.nan_to_num(at_steps(run, f"time/{name}", steps))
        lines.append(Line(name, palette(PHASES.index(name)), steps, seconds))
        rest -= seconds
    rest = np.maximum(rest, 0)
    if rest.sum() > 0.01 * total.sum():
        lines.append(Line("other", palette(len(PHASES)), steps, rest))
    return lines


def time_per_step(runs: list[Run]) -> list[Card]:
    """Of one run its phases, of several their sums."""
    lines = phases(runs[0]) if len(runs) == 1 else []
    if not lines:
        return Chart("Time per step", "time/step", "s")(runs)
    total = np.zeros(len(lines[0].y))
    for line in lines:
        total = line.high = total + line.y
    card = Card("Time per step", lines, ["time/*"], "s")
    usual = np.percentile(total, 97)
    # The first step compiles and loads: on its scale the others would be flat.
    if total.max() > 3 * usual > 0:
        card.top = 1.25 * float(usual)
        step = lines[0].x[total.argmax()]
        card.note = f"{short(total.max(), 's')} at step {step:.0f} is off the scale"
    return [card]


CHARTS: tuple[Callable[[list[Run]], list[Card]], ...] = (
    Chart("Held-out accuracy", "eval/{data}/avg@ eval/{data}/pass@", "%"),
    accuracy_over_length,
    Chart("Training accuracy", "reward/accuracy", "%"),
    Chart("Reward, mean ± std", "reward/mean", band="reward/std"),
    reward_by_position,
    Chart("Response length", "rollout/length_mean eval/{data}/length_mean", "tokens"),
    Chart("Efficiency, % accuracy per token", "rollout/efficiency eval/{data}/efficiency"),
    Chart("Truncated share", "rollout/truncated_frac eval/{data}/truncated_frac", "%"),
    Chart("Kept samples", "rollout/kept_frac", "%"),
    Chart("Prompts with no kept sample", "rollout/prompts_with_none", "prompts"),
    Chart("Clipped share", "policy/clip_frac", "%"),
    Chart("KL to the starting weights", "reference/kl", "nats"),
    Chart("Share of the input read (RCO)", "eval/{data}/rco", "%"),
    Chart("Lag behind the stream", "eval/{data}/ail eval/{data}/al eval/{data}/laal"),
    Chart("Format and thinking rewards", "reward/format reward/thinking"),
    Chart(
        "Streaming and deep length",
        "rollout/streaming_length_mean rollout/deep_length_mean",
        "tokens",
    ),
    Chart(
        "Held-out streaming and deep length",
        "eval/{data}/streaming_length_mean eval/{data}/deep_length_mean",
        "tokens",
    ),
    Chart("Skipped share", "rollout/skip_frac eval/{data}/skip_frac", "%"),
    Chart("Latency", "eval/{data}/latency_s", "s"),
    Chart("Gradient norm", "train/grad_norm", log="auto"),
    Chart("Loss", "train/loss"),
    Chart("KL to the teacher", "teacher/kl", "nats"),
    Chart("Agreement with the teacher", "teacher/agreement", "%"),
    Chart("Trainer against sampler", "mismatch/logp_abs_mean mismatch/kl", "nats", log="yes"),
    Chart("Effective sample size", "mismatch/ess", "%"),
    Chart("Entropy", "rollout/entropy", "nats"),
    Chart("Throughput", "perf/tokens_per_second", "tokens/s"),
    time_per_step,
)


def make_cards(runs: list[Run]) -> list[Card]:
    """Every card that the runs have the metrics for, in reading order."""
    cards = [card for chart in CHARTS for card in chart(runs)]
    # The grid has two columns: an odd card at the end takes both.
    if len(cards) % 2:
        cards[-1].wide = True
    return cards


def make_minis(runs: list[Run]) -> dict[str, list[Card]]:
    """Every logged metric as a small card, by its prefix."""
    groups: dict[str, list[Card]] = {}
    for key in sorted({key for run in runs for key in run.series}):
        prefix, _, name = key.rpartition("/")
        lines = [
            Line(run.label, palette(i), *run.series[key])
            for i, run in enumerate(runs)
            if key in run.series
        ]
        groups.setdefault(prefix or "other", []).append(Card(name, lines, [key]))
    return groups
