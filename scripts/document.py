"""Writes the pages that are made from the code: docs/config.md and docs/metrics.md.

The pages name keys, defaults and metrics; a test compares them with the code.

    python -m scripts.document
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from recipes import schema
from recipes.compose import recipe_values, recipes
from recipes.help import by_section, first_comment
from recipes.schema.keys import Key, as_text
from trainers.core.metric_names import METRICS, Metric

DOCS = Path(__file__).resolve().parent.parent / "docs"
CONFIG_HEAD = """\
# Keys of the config

<!-- Made by `python -m scripts.document` from recipes/schema/ and recipes/recipe/. -->

A run is configured by `KEY=VALUE` on the command line. A recipe sets some keys; the defaults below
hold for the others. `python train.py recipe=X --help` prints the keys that a run reads, with the
recipe's values. Any other key is an error, which names the recipes that read it.

`engine=zero0`, `zero1`, `zero2`, `zero2_offload`, `zero3` or `zero3_offload` sets the keys of
`engine` together. Where a component is selected by name, a class of your own can be given by its
dotted path. What is in `<…>` is a name that you give.
"""
METRICS_HEAD = """\
# Metrics

<!-- Made by `python -m scripts.document` from trainers/core/metric_names.py. -->

These are the names in `metrics.jsonl` and in Weights & Biases. A share is a number from 0 to 1.

| metric | unit | meaning | which rows have it |
|---|---|---|---|
"""


def main() -> int:
    """Write the pages; returns the exit status."""
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/{name}")
    return 0


def pages() -> dict[str, str]:
    """The text of each page by its name."""
    return {"config.md": config_page(), "metrics.md": metrics_page(METRICS)}


def config_page() -> str:
    """The recipes, and every key with the recipes that read it."""
    parts = [CONFIG_HEAD, _recipe_table()]
    for names, keys in by_readers():
        parts.append(_heading(names))
        parts += [_key_table(name, group) for name, group in by_section(keys).items()]
    return "\n".join(parts)


def by_readers() -> list[tuple[tuple[str, ...], dict[str, Key]]]:
    """The keys in groups, each of which is read by the same recipes.

    A key that two methods define differently is in two groups.
    """
    readers: list[tuple[Key, list[str]]] = []
    for recipe in recipes():
        kind = schema.run_schema(schema.groups_of(recipe_values(recipe)["trainer"]))
        for key in schema.keys_of(kind).values():
            known = next((names for other, names in readers if other == key), None)
            if known is None:
                readers.append((key, [recipe]))
            else:
                known.append(recipe)
    groups: dict[tuple[str, ...], dict[str, Key]] = {}
    for key, names in readers:
        groups.setdefault(tuple(names), {})[key.name] = key
    return sorted(groups.items(), key=lambda group: group[0] != recipes())


def metrics_page(metrics: Mapping[str, Metric]) -> str:
    """The table of metric names."""
    return METRICS_HEAD + "".join(
        f"| `{name}` | {metric.unit} | {_cell(metric.meaning)} | {metric.rows} |\n"
        for name, metric in metrics.items()
    )


def _heading(names: tuple[str, ...]) -> str:
    if names == recipes():
        return "## Every run\n"
    trainers = sorted({recipe_values(name)["trainer"] for name in names})
    listed = textwrap.fill(
        f"Recipes: {', '.join(f'`{name}`' for name in names)}.", 100, break_on_hyphens=False
    )
    return f"## trainer={', '.join(trainers)}\n\n{listed}\n"


def _recipe_table() -> str:
    rows = "".join(
        f"| `{name}` | `{recipe_values(name)['trainer']}` | {_cell(first_comment(name))} |\n"
        for name in recipes()
    )
    return f"| recipe | trainer | what it is |\n|---|---|---|\n{rows}"


def _key_table(section: str, keys: list[Key]) -> str:
    heading = f"### {_cell(section)}\n\n" if section else ""
    return (
        heading
        + "| key | type | default | values | meaning |\n|---|---|---|---|---|\n"
        + "".join(
            f"| `{key.name}` | {key.type} | {_default(key)} | {_cell(str(key.bounds))} "
            f"| {_cell(key.meaning)} |\n"
            for key in keys
        )
    )


def _default(key: Key) -> str:
    return "" if key.default == schema.REQUIRED else f"`{as_text(key.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__.strip())
        sys.exit(0)
    sys.exit(main())
