"""Reads `KEY=VALUE`: text as it stands for keys of text, Hydra's grammar for all others."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, get_args, get_origin

from recipes import schema
from recipes.errors import ConfigError
from recipes.schema import Key
from recipes.schema.keys import NAME

# Groups of Hydra: each value is a file of recipes/GROUP/.
GROUPS = ("recipe", "engine")
# Of a value that is quoted as a whole. Inside, the same sign has a backslash before it.
QUOTES = ("'", '"')


@dataclass(frozen=True)
class Override:
    """A key and its value from the command line."""

    # As the user wrote it.
    text: str
    key: str
    value: Any
    # The value is final, and Hydra does not see it.
    is_final: bool = False
    # Why the value is none of the key's. Whether the run reads the key is the first question.
    fault: str | None = None


def parsed(text: str) -> Override:
    """An override.

    The value of a key of text is taken as it stands: spaces, commas, brackets, `=` and `~` are
    letters like others, and `1e5` or `true` is no number and no truth value. Two forms keep the
    meaning that Hydra gives them: `null` where the key may be null, and a value that is quoted as a
    whole. `${…}` is filled in, as everywhere in a config.

    Raises:
        ConfigError: it is not KEY=VALUE.
    """
    name, equals, value = text.partition("=")
    general = schema.general(name, _keys())
    key = None if name in GROUPS else _keys().get(general)
    if NAME in general.split("."):
        # Hydra knows no section that it does not find in the schema.
        return replace(_parsed(text, name, equals, value, key), is_final=True)
    return _parsed(text, name, equals, value, key)


def _parsed(text: str, name: str, equals: str, value: str, key: Key | None) -> Override:
    if not equals or key is None or not _is_text(key.kind):
        return _hydra_override(text, name, value, key)
    if value.strip() != "null":
        return Override(text, name, _text(name, value), is_final=True)
    fault = None
    if key.kind is str:
        fault = (
            f"{name}=null must be a text; leave the key out for its default, "
            f"or quote the word twice: '{name}=\"null\"'"
        )
    return Override(text, name, None, is_final=True, fault=fault)


@functools.cache
def _keys() -> Mapping[str, Key]:
    """The keys of all methods by name."""
    return schema.keys_of(schema.run_schema(tuple(schema.GROUPS)))


def _is_text(kind: Any) -> bool:
    return kind is str or set(get_args(kind)) == {str, NoneType}


def _text(name: str, value: str) -> str:
    plain = value.strip()
    if len(plain) < 2 or plain[0] not in QUOTES or plain[-1] != plain[0]:
        return value
    from hydra.core.override_parser.types import QuotedString

    quoted = _hydra(f"{name}={plain}")
    # Two quoted parts, as in "a" or "b", are no quoted whole.
    if quoted is None or not isinstance(quoted._value, QuotedString):
        return value
    return quoted.value()


def _hydra_override(text: str, name: str, value: str, key: Key | None) -> Override:
    override = _hydra(text)
    if override is None and key is not None:
        return Override(text, name, value, fault=f"{text} must be a {key.type}")
    if override is None:
        raise ConfigError(f"'{text}' is not KEY=VALUE")
    if override.is_add() or override.is_force_add() or override.is_delete():
        raise ConfigError(f"'{text}': a key is neither added nor deleted; set it, as in KEY=VALUE")
    fault = None
    if key is not None and key.kind is Any and isinstance(override.value(), dict):
        fault = f"{text} must be a number, a text, true, false, null or a list of them"
    several = override.is_sweep_override()
    if key is not None and get_origin(key.kind) is tuple:
        if several or not isinstance(override.value(), list):
            fault = f"{text} must be a {key.type}, in brackets: {name}=[{value}]"
    elif several:
        fault = f"{text} has several values; a run takes one"
        if name in GROUPS:
            raise ConfigError(fault)
    return Override(text, override.key_or_group, override.value(), fault=fault)


def _hydra(text: str) -> Any:
    """Hydra's override; None where its grammar refuses the text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(text)
    # The others: a number of too many digits for Python, brackets too deep for it.
    except (HydraException, ValueError, RecursionError):
        return None
