"""Cells of a table: what is in them as text, and how they are found."""

from __future__ import annotations

from collections.abc import Iterable
from math import isnan
from typing import Any

from recipes.errors import DataError


def is_missing(value: Any) -> bool:
    """Whether a cell has no value. Pandas and Parquet write NaN for a gap."""
    return value is None or (isinstance(value, float) and isnan(value))


def without_gaps(row: dict[str, Any]) -> dict[str, Any]:
    """The row with None in every cell that has no value."""
    if not any(map(is_missing, row.values())):
        return row
    return {name: None if is_missing(value) else value for name, value in row.items()}


def cell(row: dict[str, Any], column: str | None) -> Any:
    """The value of a column, or of a dotted path into nested ones; None where there is none."""
    if column is None or column in row:
        return row.get(column)
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return None if is_missing(value) else value


def cell_text(value: Any, where: str, column: str) -> str | None:
    """A cell as text without white space around it, None for an empty one.

    Args:
        value: a text, a number, a date.
        where: file and row, for errors.
        column: of the cell, for errors.

    Raises:
        DataError: it is a list, an object or bytes.
    """
    if is_missing(value):
        return None
    if isinstance(value, list | tuple | dict | bytes):
        raise DataError(
            f"{where}: '{column}' holds a {type(value).__name__} where a text or a number is "
            "expected; name a path into it, as in data.answer_column=COLUMN.NAME, or drop the row"
        )
    if isinstance(value, float) and value.is_integer():
        # A column of integers with a gap comes back as floats.
        value = int(value)
    return str(value).strip() or None


def listed(names: Iterable[str]) -> str:
    """Names for an error of one line."""
    return ", ".join(name if name.isprintable() else ascii(name) for name in names)
