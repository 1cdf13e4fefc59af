"""Writing the page."""

from __future__ import annotations

import os
import re
from pathlib import Path

from scripts.report.cards import make_cards, make_minis
from scripts.report.completions import MAX_CHARACTERS, facts, marked, reward_scale, spans
from scripts.report.directory import Run, name_runs, read_run
from scripts.report.numbers import short
from scripts.report.policies import policy_cards
from scripts.report.summary import make_tiles

FOLDER = Path(__file__).parent
# What a title line says of a single run.
SETTINGS = {
    "model": "model.path",
    "teacher": "teacher.path",
    "data": "data.path",
    "reward": "reward.token",
    "lr": "train.lr",
    "seed": "seed",
}
# In place of the teacher there.
NAMED_TEACHER = re.compile(r"teachers\.[^.]+\.path")
# Settings that differ between any two runs.
OWN_KEYS = ("recipe", "run.dir")


def write_report(run_dir: Path, *others: Path) -> Path:
    """Write `run_dir/report.html`, which compares a run with others, and return its path."""
    runs = [read_run(Path(path)) for path in (run_dir, *others)]
    name_runs(runs)
    html = _render(runs)
    # Whoever has the page open never sees half of it.
    partial = Path(run_dir) / f".report.{os.getpid()}.html"
    # Half a surrogate pair, which a cut completion may end in, has no UTF-8.
    partial.write_bytes(html.encode("utf-8", "replace"))
    return partial.replace(Path(run_dir) / "report.html")


def _render(runs: list[Run]) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "marked": marked}
    return environment.get_template("page.html.j2").render(
        runs=runs,
        settings=_settings(runs[0]),
        tiles=[make_tiles(run) for run in runs],
        differences=_differences(runs),
        cards=policy_cards(runs) + make_cards(runs),
        scale=reward_scale(runs),
        limit=MAX_CHARACTERS,
        facts=facts,
        spans=spans,
        minis=make_minis(runs),
        style=Markup((FOLDER / "style.css").read_text(encoding="utf-8")),
        script=Markup((FOLDER / "charts.js").read_text(encoding="utf-8")),
    )


def _settings(run: Run) -> dict:
    settings = {"run": run.path.resolve().name}
    for name, key in SETTINGS.items():
        value = run.config.get(key)
        if value is not None:
            settings[name] = value
    several = [str(value) for key, value in run.config.items() if NAMED_TEACHER.fullmatch(key)]
    if several:
        settings["teacher"] = ", ".join(several)
    return settings


def _differences(runs: list[Run]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs."""
    differences = {}
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [str(run.config.get(key, "–")) for run in runs]
        if len(set(values)) > 1 and key not in OWN_KEYS:
            differences[key] = values
    return differences
