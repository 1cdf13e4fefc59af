"""What a key of the config is: its default, its bounds and its meaning, all in its field."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import omegaconf

from recipes.errors import ConfigError
from recipes.registry import Registry, nearest

REQUIRED = omegaconf.MISSING
# Stands for a name that the user gives, as in `teachers.NAME.path`.
NAME = "NAME"
GIVEN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Bounds:
    """What a value must be. Each entry of a list is held to the same."""

    # The values that are allowed; empty: any.
    choices: tuple[Any, ...] = ()
    # The components that are allowed by name, beside any dotted path.
    component: Registry | None = None
    above: float | None = None
    below: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    # One value outside the bounds that is allowed too, as -1 is where it means "off".
    off: float | None = None

    def __str__(self) -> str:
        if self.component is not None:
            return f"{', '.join(self.component)}; or the dotted path of one"
        if self.choices:
            return ", ".join(map(as_text, self.choices))
        if self.at_least is not None and self.at_most is not None:
            return f"between {self.at_least:g} and {self.at_most:g}"
        parts = [
            form.format(bound)
            for form, bound in (
                ("{:g} (off)", self.off),
                ("above {:g}", self.above),
                ("{:g} or more", self.at_least),
                ("below {:g}", self.below),
                ("at most {:g}", self.at_most),
            )
            if bound is not None
        ]
        return (" or " if self.off is not None else " and ").join(parts)

    def hold(self, value: Any) -> bool:
        """Whether `value` is inside."""
        if self.component is not None:
            return value in self.component or "." in value
        if self.choices:
            return value in self.choices
        if value == self.off:
            return True
        return (
            (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
        )


@dataclass(frozen=True)
class Key:
    """A key of the config.

    Args:
        name: dotted, as in `train.steps`.
        kind: the annotation of its field.
        default: None where that is the default; `REQUIRED` where there is none.
        meaning: a sentence.
    """

    name: str
    kind: Any
    default: Any
    bounds: Bounds
    meaning: str

    @property
    def type(self) -> str:
        """Its type in words: `number or null`, `list of whole numbers`."""
        return type_name(self.kind)

    def check(self, value: Any) -> None:
        """Refuse an impossible value.

        Raises:
            ConfigError: one line that names the key.
        """
        if value is None and NoneType in get_args(self.kind):
            return
        if not _has_length(value, self.kind):
            raise ConfigError(f"{self.name}={as_text(value)} must be a {type_name(self.kind)}")
        entries = list(_entries(value))
        wrong = [entry for entry in entries if not self.bounds.hold(entry)]
        if not wrong:
            return
        valid = self.bounds.component or self.bounds.choices
        if not valid:
            each = "" if entries == [value] else "numbers, each "
            raise ConfigError(f"{self.name}={as_text(value)} must be {each}{self.bounds}")
        hint = f"; one of: {self.bounds}"
        if isinstance(wrong[0], str):
            hint = nearest(wrong[0], [name for name in valid if isinstance(name, str)])
        raise ConfigError(f"{self.name}={as_text(value)} is not known{hint}")


def key(default: Any, meaning: str, **bounds: Any) -> Any:
    """A field of a section.

    Args:
        default: its value where nobody gives one.
        meaning: a sentence about it.
        bounds: the arguments of `Bounds`.
    """
    return field(default=default, metadata={"meaning": meaning, "bounds": Bounds(**bounds)})


def free(meaning: str) -> Any:
    """A field whose keys the user names, `dict[str, Any]`; `meaning` is a sentence about one."""
    return field(default_factory=dict, metadata={"meaning": meaning, "bounds": Bounds()})


def section_kind(kind: Any) -> Any:
    """The class of the sections that a `dict[str, …]` holds, each under a name that the user gives;
    None: the annotation is of something else."""
    inside = get_args(kind)[1] if get_origin(kind) is dict else None
    return inside if is_dataclass(inside) else None


def general(name: str, names: Collection[str]) -> str:
    """`teachers.NAME.path` for `teachers.math.path`; any other name as it is.

    Args:
        names: of keys and sections.
    """
    if name in names:
        return name
    return next((known for known in names if NAME in known and _stands_for(known, name)), name)


def _stands_for(known: str, name: str) -> bool:
    expected, parts = known.split("."), name.split(".")
    return len(expected) == len(parts) and all(
        part == word or (word == NAME and GIVEN_NAME.fullmatch(part))
        for word, part in zip(expected, parts, strict=True)
    )


def hints_of(schema: Any) -> dict[str, Any]:
    """The annotations of a section's fields by name."""
    hints = get_type_hints(schema)
    return {entry.name: hints[entry.name] for entry in fields(schema)}


def keys_of(schema: Any, prefix: str = "") -> dict[str, Key]:
    """Every key of a schema by its dotted name, in order."""
    found: dict[str, Key] = {}
    hints = hints_of(schema)
    for entry in fields(schema):
        name, kind = prefix + entry.name, hints[entry.name]
        if is_dataclass(kind):
            found |= keys_of(kind, name + ".")
            continue
        if section := section_kind(kind):
            found |= keys_of(section, f"{name}.{NAME}.")
            continue
        if get_origin(kind) is dict:
            name, kind = f"{name}.{NAME}", get_args(kind)[1]
        default = REQUIRED if entry.default is NO_DEFAULT else entry.default
        bounds = entry.metadata["bounds"]
        found[name] = Key(name, kind, default, bounds, entry.metadata["meaning"])
    return found


def section_names(names: Collection[str]) -> set[str]:
    """The sections that dotted keys are in."""
    return {name[:index] for name in names for index, letter in enumerate(name) if letter == "."}


NAMES = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Any: "any value",
}


def type_name(kind: Any, plural: bool = False) -> str:
    """An annotation in words."""
    arguments = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("null" if k is NoneType else type_name(k) for k in arguments)
    if get_origin(kind) is tuple:
        inside = type_name(arguments[0], plural=True)
        if arguments[-1] is Ellipsis:
            return f"list{'s' if plural else ''} of {inside}"
        return f"{'pairs' if plural else 'pair'} of {inside}"
    return NAMES[kind] + ("s" if plural and kind is not str and kind is not bool else "")


def as_text(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(as_text, value))}]"
    if isinstance(value, str) and (not value or set(value) & set(" \n,'\"")):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _entries(value: Any):
    if not isinstance(value, (list, tuple)):
        yield value
        return
    for entry in value:
        yield from _entries(entry)


def _has_length(value: Any, kind: Any) -> bool:
    """Whether a tuple, and each tuple in it, is as long as its annotation says."""
    if get_origin(kind) is not tuple:
        return True
    inside = get_args(kind)
    if inside[-1] is not Ellipsis:
        return len(value) == len(inside)
    return all(_has_length(entry, inside[0]) for entry in value)
