"""Turns command-line overrides into one checked, frozen config, and every mistake into one line."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from datetime import datetime
from pathlib import Path
from types import GenericAlias
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from recipes import foreign_names, schema
from recipes.errors import ConfigError, first_line
from recipes.overrides import GROUPS, Override, parsed
from recipes.registry import nearest
from recipes.schema import Config

TREE = Path(__file__).parent
AnyConfig = TypeVar("AnyConfig", bound=Config)


@dataclass(frozen=True)
class Selection:
    """What some overrides select."""

    # In their order. Of two with one key, the last counts.
    overrides: tuple[Override, ...]
    recipe: str
    trainer: str
    # The schema of the run.
    kind: type[Config]

    @property
    def reader(self) -> str:
        """What decides which keys the run reads, as it is written on the command line."""
        if self.trainer == recipe_values(self.recipe)["trainer"]:
            return f"recipe={self.recipe}"
        return f"trainer={self.trainer}"


def select(overrides: Iterable[str]) -> Selection:
    """The recipe and the trainer that overrides select, and with them the keys that the run reads.

    Raises:
        ConfigError: an override is not KEY=VALUE, or the recipe or the trainer is not known.
    """
    parsed_overrides = tuple(map(parsed, overrides))
    given = {override.key: override.value for override in parsed_overrides}
    recipe = str(given.get("recipe", _default_recipe()))
    if recipe not in recipes():
        raise ConfigError(f"recipe={recipe} is not known{nearest(recipe, recipes())}")
    trainer = str(given.get("trainer", recipe_values(recipe)["trainer"]))
    kind = schema.run_schema(schema.groups_of(trainer))
    return Selection(parsed_overrides, recipe, trainer, kind)


def compose(overrides: Iterable[str]) -> Config:
    """The config of a run: frozen objects, of the keys that the run's trainer reads.

    Args:
        overrides: Hydra overrides, e.g. `["recipe=poweropd", "train.steps=10"]`.

    Raises:
        ConfigError: an unknown key, one of another method, a wrong type or an impossible value; one
            line that names the key.
    """
    selection = select(overrides)
    for override in selection.overrides:
        _check_override(override.key, override.value, selection)
        if override.fault:
            raise ConfigError(override.fault)
    for key in recipe_values(selection.recipe):
        _check_recipe_key(key, selection)
    return _built(selection.kind, _composed(selection))


@functools.cache
def _default_recipe() -> str:
    defaults = yaml.safe_load((TREE / "config.yaml").read_text())["defaults"]
    return next(entry["recipe"] for entry in defaults if "recipe" in entry)


@functools.cache
def recipes() -> tuple[str, ...]:
    """The names of all recipes."""
    return tuple(sorted(path.stem for path in (TREE / "recipe").glob("*.yaml")))


@functools.cache
def recipe_values(name: str) -> Mapping[str, Any]:
    """What a recipe and those that it is based on set, by dotted key."""
    content = yaml.safe_load((TREE / "recipe" / f"{name}.yaml").read_text())
    values: dict[str, Any] = {}
    for base in content.pop("defaults", ["_self_"]):
        values |= flatten(content) if base == "_self_" else recipe_values(base)
    return values


@functools.cache
def readers(key: str) -> tuple[str, ...]:
    """The recipes that read a key, one of each trainer: that on which the others are based."""
    found: dict[str, str] = {}
    for recipe in sorted(recipes(), key=_depth):
        trainer = recipe_values(recipe)["trainer"]
        if key in _all_names(schema.run_schema(schema.groups_of(trainer))):
            found.setdefault(trainer, recipe)
    return tuple(sorted(found.values()))


def _depth(recipe: str) -> int:
    """How many recipes a recipe is based on, one upon another."""
    content = yaml.safe_load((TREE / "recipe" / f"{recipe}.yaml").read_text())
    bases = [base for base in content.get("defaults", ()) if base != "_self_"]
    return max((1 + _depth(base) for base in bases), default=0)


def schema_keys(kind: type[Config] | None = None) -> frozenset[str]:
    """Every key of a config as a dotted path, sections included; by default of all methods."""
    return _all_names(kind or schema.run_schema(tuple(schema.GROUPS)))


def _all_names(kind: type[Config]) -> frozenset[str]:
    names = schema.keys_of(kind)
    return frozenset(names.keys() | schema.section_names(names))


def _check_override(key: str, value: Any, selection: Selection) -> None:
    """Refuse a key that the run does not read, and an unknown choice of a group."""
    if key not in GROUPS:
        check_key(key, selection.kind, selection.reader)
        return
    choices = {path.stem for path in (TREE / key).glob("*.yaml")}
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{key}={value} is not known{nearest(str(value), choices)}")


def _check_recipe_key(key: str, selection: Selection) -> None:
    """Refuse a recipe with a key that the run does not read."""
    try:
        check_key(key, selection.kind, selection.reader)
    except ConfigError as error:
        raise ConfigError(f"recipe={selection.recipe} sets {key}: {error}") from error


def check_key(key: str, kind: type[Config], reader: str) -> None:
    """Refuse what is not a key of a run.

    Args:
        kind: the run's schema.
        reader: what decides on it, as `recipe=poweropd`.

    Raises:
        ConfigError: one line that names the nearest valid key, or the recipes that read this one.
    """
    names = _all_names(kind)
    known = schema.general(key, names)
    if known in schema.keys_of(kind):
        return
    if known in names:
        raise ConfigError(
            f"'{key}' is a section, not a value; set one of its keys, as in '{key}.…=…'"
        )
    if key in schema.OLD_NAMES:
        raise ConfigError(f"'{key}' is now '{schema.OLD_NAMES[key]}'")
    elsewhere = schema.general(key, schema_keys())
    if elsewhere in schema_keys():
        *first, last = [f"recipe={name}" for name in readers(elsewhere)]
        verb = f"{', '.join(first)} and {last} read" if first else f"{last} reads"
        raise ConfigError(f"{key} is not read by {reader}; {verb} it")
    raise ConfigError(_no_such_key(key, kind))


def _depth_then_name(key: str) -> tuple[int, str]:
    return key.count("."), key


def _no_such_key(key: str, kind: type[Config]) -> str:
    keys, leaf = _all_names(kind), key.rsplit(".", 1)[-1]
    same = [name for name in keys if name.rsplit(".", 1)[-1] == leaf]
    hint = foreign_names.hint(key, keys)
    if hint is None:
        hint = (
            f"; did you mean '{min(same, key=_depth_then_name)}'?" if same else nearest(key, keys)
        )
    if len(hint) > 200:
        hint = "; `python train.py --help` prints every key"
    return f"there is no key '{key}'{hint}"


def _composed(selection: Selection) -> DictConfig:
    """The values of a run, from the schema, the engine, the recipe and the command line."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    if not OmegaConf.has_resolver("now"):
        OmegaConf.register_new_resolver("now", datetime.now().strftime)
    ConfigStore.instance().store(name="schema", node=_editable(selection.kind))
    others = [override.text for override in selection.overrides if not override.is_final]
    try:
        with initialize_config_dir(str(TREE), version_base="1.3"):
            values = hydra_compose("config", overrides=others)
        for override in selection.overrides:
            if override.is_final:
                _set(values, override.key, override.value)
        return values
    # OverflowError: a whole number that is larger than any number.
    except (OmegaConfBaseException, OverflowError) as error:
        raise ConfigError(_with_key(error)) from error
    except HydraException as error:
        cause = error.__cause__
        known = cause if isinstance(cause, OmegaConfBaseException) else error
        raise ConfigError(_with_key(known)) from error


def _set(values: DictConfig, key: str, value: Any) -> None:
    """Set a value, in a section that may be new."""
    names = key.split(".")
    if OmegaConf.select(values, ".".join(names[:-1])) is not None:
        OmegaConf.update(values, key, value, force_add=True)
        return
    inside = functools.reduce(lambda node, name: {name: node}, reversed(names), value)
    with open_dict(values):
        values.merge_with(inside)


def _built(kind: type[AnyConfig], values: DictConfig) -> AnyConfig:
    """The frozen config of checked values."""
    for key, old in schema.OLD_VALUES.items():
        value = OmegaConf.select(values, key)
        if value in old:
            raise ConfigError(f"{key}={value} is now {old[value]}")
    try:
        OmegaConf.resolve(values)
        missing = sorted(OmegaConf.missing_keys(values))
    except OmegaConfBaseException as error:
        raise ConfigError(_with_key(error)) from error
    if missing:
        raise ConfigError(f"{missing[0]} has no value; give one, as in '{missing[0]}=…'")
    plain: Any = OmegaConf.to_container(values)
    config = _frozen(kind, plain)
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    return config


def _editable(kind: Any) -> Any:
    """A section's class as OmegaConf merges into it: not frozen, with lists in the place of
    tuples."""
    entries: list[tuple[str, Any, Any]] = []
    hints = schema.hints_of(kind)
    for entry in fields(kind):
        hint, default = hints[entry.name], entry.default
        if is_dataclass(hint):
            hint = _editable(hint)
            entries.append((entry.name, hint, field(default_factory=hint)))
        elif section := schema.section_kind(hint):
            sections = GenericAlias(dict, (str, _editable(section)))
            entries.append((entry.name, sections, field(default_factory=dict)))
        elif get_origin(hint) is dict:
            entries.append((entry.name, hint, field(default_factory=dict)))
        elif isinstance(default, tuple):
            copied: Any = field(default_factory=functools.partial(list, default))
            entries.append((entry.name, _listed(hint), copied))
        else:
            entries.append((entry.name, hint, field(default=default)))
    return make_dataclass(kind.__name__, entries)


def _listed(hint: Any) -> Any:
    """An annotation with lists in the place of tuples."""
    if get_origin(hint) is not tuple:
        return hint
    return GenericAlias(list, (_listed(get_args(hint)[0]),))


def _frozen(kind: type[AnyConfig], values: Mapping[str, Any]) -> AnyConfig:
    hints = schema.hints_of(kind)
    return kind(**{name: _frozen_value(hints[name], value) for name, value in values.items()})


def _frozen_value(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        section: Any = hint
        return _frozen(section, value)
    if section := schema.section_kind(hint):
        return {name: _frozen(section, inside) for name, inside in value.items()}
    return _tupled(value)


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _with_key(error: Exception) -> str:
    message = first_line(error)
    key = getattr(error, "full_key", None)
    if isinstance(error, (GrammarParseError, InterpolationResolutionError)):
        message += "; ${NAME} stands for the value of another key"
    return f"{key}: {message}" if key else message


def validate(config: Config, world_size: int) -> None:
    """Refuse impossible values and combinations.

    Args:
        world_size: the number of ranks.

    Raises:
        ConfigError: one line that names the key.
    """
    keys = schema.keys_of(type(config))
    for name, value in flatten(config).items():
        replace(keys[schema.general(name, keys)], name=name).check(value)
    schema.check(config)
    schema.common.check_ranks(config, world_size)


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain nested dictionaries, lists and values.

    Args:
        config: what `compose` returns, a section of it, or a mapping, such as a loaded config.yaml.
    """
    if isinstance(config, Mapping):
        return _plain(config)
    return _plain(asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def to_yaml(config: Any) -> str:
    """The config as YAML, which `compose` reads again."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def flatten(config: Any) -> dict[str, Any]:
    """The config's values by dotted key, as in `{"train.steps": 10}`; lists stay whole."""
    return dict(leaves(to_dict(config)))


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested mapping with their dotted names; lists stay whole."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
