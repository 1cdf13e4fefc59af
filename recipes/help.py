"""What `--help` prints: the keys that a run reads, from the schema itself."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from recipes import schema
from recipes.compose import TREE, compose, flatten, recipes, select
from recipes.schema.keys import Key, as_text

WIDTH = 100
USAGE = """\
torchrun --nproc_per_node=N train.py recipe=NAME [KEY=VALUE …]
python train.py recipe=NAME [KEY=VALUE …]            the same with one rank
python train.py recipe=NAME --help                   the keys that it reads, with its values
"""


def help_text(overrides: Iterable[str]) -> str:
    """The recipes, and the keys that the run reads: values, types, bounds and meanings.

    Args:
        overrides: as for `compose`; the values shown are those of the run that they give.

    Raises:
        ConfigError: the overrides are wrong.
    """
    overrides = list(overrides)
    selection = select(overrides)
    values = flatten(compose(overrides))
    engines = sorted(path.stem for path in (TREE / "engine").glob("*.yaml"))
    parts = [
        USAGE,
        "Recipes\n\n" + _table({name: first_comment(name) for name in recipes()}),
        f"Keys of {selection.reader}\n\n" + _table({"engine": f"ZeRO stage: {', '.join(engines)}"}),
    ]
    for name, keys in by_section(schema.keys_of(selection.kind)).items():
        heading = f"{name}.*\n\n" if name else ""
        parts.append(
            heading + "".join(entry(key, values.get(key.name, key.default)) for key in keys)
        )
    return "\n".join(parts).rstrip("\n")


def command_help(docstring: str, short_keys: Mapping[str, str]) -> str:
    """A command's documentation, and the keys that it takes.

    No default is shown: a command starts from values of its own, not from the schema's.

    Args:
        docstring: that of its module.
        short_keys: its own keys, each with the config's key that it stands for, or with its
            meaning.
    """
    known = schema.keys_of(schema.run_schema(tuple(schema.GROUPS)))
    parts = [docstring.strip() + "\n"]
    own = ""
    for name, meaning in short_keys.items():
        if meaning in known:
            own += entry(known[meaning], schema.REQUIRED, name)
        else:
            own += f"  {name}\n{_wrapped(meaning)}"
    if own:
        parts.append("Keys\n\n" + own)
    return "\n".join(parts).rstrip("\n")


def entry(key: Key, value: Any, name: str | None = None) -> str:
    """A key's lines.

    Args:
        value: what it is without an override.
        name: what it is called here; None: its own name.
    """
    shown = "" if value == schema.REQUIRED else f"={as_text(value)}"
    label = f"  {name}  ({key.name}{shown})" if name else f"  {key.name}{shown}"
    limits = f"[{key.type}: {key.bounds}]" if str(key.bounds) else f"[{key.type}]"
    if len(label) + len(limits) + 2 <= WIDTH:
        return f"{label}  {limits}\n{_wrapped(key.meaning)}"
    return f"{label}\n{_wrapped(limits)}{_wrapped(key.meaning)}"


def by_section(keys: Mapping[str, Key]) -> dict[str, list[Key]]:
    """Keys by the section that they are in; those of none, "", come first."""
    found: dict[str, list[Key]] = {"": []}
    for name, key in keys.items():
        found.setdefault(name.rpartition(".")[0], []).append(key)
    return {section: inside for section, inside in found.items() if inside}


def first_comment(recipe: str) -> str:
    """The first line that a recipe says about itself."""
    lines = (TREE / "recipe" / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    return next(line[2:] for line in lines if line.startswith("# ") and "@package" not in line)


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "".join(f"  {name:{width}}  {text}\n" for name, text in rows.items())


def _wrapped(text: str) -> str:
    indent = " " * 6
    lines = textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False)
    return "".join(f"{indent}{line}\n" for line in lines)
