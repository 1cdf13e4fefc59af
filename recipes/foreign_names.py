"""What keys of TRL and verl are called here, for hints about keys that do not exist.

The one table is the page docs/keys_from_trl_and_verl.md, which people read too."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from recipes.overrides import GROUPS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "keys_from_trl_and_verl.md"
# What is in brackets are defaults.
BRACKETS = re.compile(r"\([^()]*\)")
CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Counterpart:
    """A row of the page, for one of its names."""

    # TRL or verl.
    project: str
    # As the page has it, without a value.
    name: str
    # What stands in its place here, as `train.lr`; empty: nothing does.
    ours: tuple[str, ...]
    # Where it differs.
    remark: str

    @property
    def keys(self) -> tuple[str, ...]:
        """`ours` without values."""
        return tuple(name.partition("=")[0] for name in self.ours)


def hint(key: str, known: Collection[str]) -> str | None:
    """What a key of another project is here, as the end of an error's line; None: nobody's is.

    Args:
        key: with any sections before it. Of a name in several rows, those come first that lead to
            a known key.
        known: the keys that the run reads.
    """
    leaf = key.rpartition(".")[2]
    found = [row for row in rows() if row.name.rpartition(".")[2] == leaf]
    whole = [row for row in found if f".{key}".endswith(f".{row.name.lstrip('.')}")]
    # A leaf that is ours too says little by itself.
    if not whole and any(name.rpartition(".")[2] == leaf for name in known):
        return None
    candidates = whole or found
    first = [row for row in candidates if set(row.keys) & {*known, *GROUPS}]
    candidates = first or candidates
    if not candidates:
        return None
    row = candidates[0]
    ours = dict.fromkeys(name for row in candidates for name in row.ours)
    if ours:
        return f"; {row.project}'s {row.name} is {' or '.join(ours)} here"
    remark = f": {row.remark}" if row.remark else ""
    return f"; {row.project}'s {row.name} has no counterpart here{remark}".rstrip(".")


@functools.cache
def rows() -> tuple[Counterpart, ...]:
    """The rows of the page's tables of keys; none where the page was not installed."""
    if not PAGE.is_file():
        return ()
    found: list[Counterpart] = []
    project = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            project = ""
        elif cells[0] in ("TRL", "verl") and cells[1] == "Onstream":
            project = cells[0]
        elif project and set(line) != set("|-"):
            found += _row(project, *cells[:3])
    return tuple(found)


def _row(project: str, names: str, ours: str, remark: str) -> list[Counterpart]:
    theirs = [name.partition("=")[0] for name in CODE.findall(BRACKETS.sub("", names))]
    # A name with a stop at its end is a section: the key has the same name there.
    keys = tuple(name for name in CODE.findall(BRACKETS.sub("", ours)) if name[-1] != ".")
    pairwise = len(theirs) == len(keys)
    return [
        Counterpart(project, name, (keys[place],) if pairwise else keys, remark)
        for place, name in enumerate(theirs)
    ]
