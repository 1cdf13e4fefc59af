"""The cards of `curves.json`: quality over lag, and a table of the figures.

The file is {"data", "quality", "lag", "policies": {name: [point, …]}}. A point is a setting of the
policy with its figures.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from scripts.report.cards import Card, Line, among, palette
from scripts.report.directory import Run
from scripts.report.numbers import finite, numbers, short

ACRONYMS = ("bleu", "f1", "rco", "ail", "al", "laal")
NAMES = {"chrf": "chrF", **{name: name.upper() for name in ACRONYMS}}
DEFAULTS = {"data": "", "quality": "bleu", "lag": "al"}


def policy_cards(runs: list[Run]) -> list[Card]:
    """One card for the runs whose data, quality and lag are the same."""
    groups = defaultdict(list)
    for i, run in enumerate(runs):
        axes = {key: str(run.curves.get(key) or usual) for key, usual in DEFAULTS.items()}
        for j, (name, points) in enumerate(_policies(run)):
            points = _by_lag(points, axes["lag"])
            x = _figures(points, axes["lag"]).round(3)
            y = _figures(points, axes["quality"])
            # A point without its lag is in the table only.
            placed = np.isfinite(x)
            line = Line(name, palette(j), x[placed], y[placed])
            policy = among(runs, line, i, dash=j), points
            groups[axes["data"], axes["quality"], axes["lag"]].append(policy)
    cards = [_card(*axes, policies) for axes, policies in groups.items()]
    return [card for card in cards if card.lines]


def _policies(run: Run) -> list[tuple[str, list[dict]]]:
    """Names and points, without what is neither."""
    found = run.curves.get("policies")
    if not isinstance(found, dict):
        return []
    return [
        (name, [point for point in points if isinstance(point, dict)])
        for name, points in found.items()
        if isinstance(points, list)
    ]


def _by_lag(points: list[dict], lag: str) -> list[dict]:
    """The points in the order of their lag, those without one last."""
    order = np.argsort(_figures(points, lag), kind="stable")
    return [points[place] for place in order]


def _figures(points: list[dict], key: str) -> np.ndarray:
    return numbers([point.get(key) for point in points])


def _card(data: str, quality: str, lag: str, policies: list[tuple[Line, list[dict]]]) -> Card:
    return Card(
        title=f"Latency and quality · {data}" if data else "Latency and quality",
        lines=[line for line, _ in policies if len(finite(line.y))],
        keys=["curves.json"],
        unit=_name(quality),
        # RCO is a share of the input; the other lags count words or segments of it.
        x_label=_name(lag) if lag == "rco" else f"{_name(lag)}, source units",
        last_values=False,
        wide=True,
        table=_table(policies, [lag, quality]),
    )


def _table(policies: list[tuple[Line, list[dict]]], first: list[str]) -> dict:
    """Every point with its figures, those of `first` in front."""
    lines, points = [], []
    for line, own in policies:
        lines += [line] * len(own)
        points += own
    columns = {"setting": [short(point.get("setting"), digits=4) for point in points]}
    for keys in (first, *points):
        for key in keys:
            figures = _figures(points, key)
            if key not in columns and len(finite(figures)):
                columns[key] = _column(figures)
    cells = zip(*columns.values())
    return {"columns": [_name(key) for key in columns], "rows": list(zip(lines, cells))}


def _column(values: np.ndarray) -> list[str]:
    """Figures with one number of decimals: three for shares, else two."""
    decimals = 3 if np.nanmax(abs(values)) <= 1 else 2
    texts = [f"{value:.{decimals}f}" for value in values]
    return ["–" if text == "nan" else text.replace("-", "−") for text in texts]


def _name(key: str) -> str:
    return NAMES.get(key, key.replace("_", " "))
