"""The typed schema: every key, its type, default, bounds and meaning. Defaults live here only.

A run reads the keys of `common`, and those of the groups that its trainer has in `SECTIONS`. Each
group is a config of its own, which extends the common one; a trainer with several has a config that
extends them all. The code gets these as frozen objects.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import Any

from recipes.components import TRAINERS
from recipes.errors import ConfigError
from recipes.registry import nearest
from recipes.schema import common, reading, rewards, simultaneous
from recipes.schema.common import Config, DataConfig
from recipes.schema.distillation import Distillation
from recipes.schema.grpo import Grpo
from recipes.schema.hrpo import Hrpo
from recipes.schema.keys import (
    REQUIRED,
    Key,
    general,
    hints_of,
    key,
    keys_of,
    section_kind,
    section_names,
)
from recipes.schema.offline_distillation import OfflineDistillation
from recipes.schema.onpolicy_sft import OnPolicySft
from recipes.schema.reading import MASKED_LAYOUTS
from recipes.schema.simultaneous import Simultaneous
from recipes.schema.streaming import Streaming

__all__ = [
    "GROUPS",
    "MASKED_LAYOUTS",
    "OLD_NAMES",
    "OLD_VALUES",
    "REQUIRED",
    "SECTIONS",
    "Config",
    "DataConfig",
    "Distillation",
    "Grpo",
    "Hrpo",
    "Key",
    "OfflineDistillation",
    "OnPolicySft",
    "Simultaneous",
    "Streaming",
    "check",
    "general",
    "groups_of",
    "hints_of",
    "keys_of",
    "run_schema",
    "section_kind",
    "section_names",
]

GROUPS: dict[str, type[Config]] = {
    "distillation": Distillation,
    "grpo": Grpo,
    "hrpo": Hrpo,
    "offline_distillation": OfflineDistillation,
    "onpolicy_sft": OnPolicySft,
    "streaming": Streaming,
    "simultaneous": Simultaneous,
}
# The groups that a trainer reads beside the common keys. A trainer from outside names its own in
# the class attribute `sections`; without one it reads all.
SECTIONS: dict[str, tuple[str, ...]] = {
    "opd": ("distillation",),
    "grpo": ("grpo",),
    "hrpo": ("hrpo", "streaming"),
    "sft": (),
    "offline_distillation": ("offline_distillation",),
    "onpolicy_sft": ("onpolicy_sft",),
    "streaming_sft": ("streaming",),
    "proactivellm": ("simultaneous",),
}
# Keys that had another name: old -> new.
OLD_NAMES: dict[str, str] = {}
# Values that had another name, by key: old -> new.
OLD_VALUES: dict[str, dict[str, str]] = {
    "train.normalizer": {"window_token_mean": "token_mean"},
}


def groups_of(trainer: str) -> tuple[str, ...]:
    """The names of the groups that a trainer reads.

    Args:
        trainer: its registered name, or a dotted path, which is imported.

    Raises:
        ConfigError: there is no such trainer, or it names a group that is not there.
    """
    if trainer in SECTIONS:
        return SECTIONS[trainer]
    groups = getattr(TRAINERS.resolve(trainer), "sections", None)
    if groups is None:
        return tuple(GROUPS)
    for group in groups:
        if group not in GROUPS:
            raise ConfigError(
                f"trainer={trainer}: its `sections` has '{group}', which is not known"
                f"{nearest(group, GROUPS)}"
            )
    return tuple(groups)


@functools.cache
def run_schema(groups: tuple[str, ...]) -> type[Config]:
    """The config of a run: the common keys and those of some groups."""
    if not groups:
        return Config
    return _joined([GROUPS[group] for group in groups])


def _joined(kinds: Sequence[Any]) -> Any:
    """A section with the fields of several; those that are sections themselves are joined too.

    Where two have the same key with other choices, it has the choices of both.
    """
    kinds = [
        kind
        for index, kind in enumerate(kinds)
        if kind not in kinds[:index]
        and not any(other is not kind and issubclass(other, kind) for other in kinds)
    ]
    if len(kinds) == 1:
        return kinds[0]
    joined = []
    for name in dict.fromkeys(entry.name for kind in kinds for entry in fields(kind)):
        owners = [kind for kind in kinds if name in kind.__dataclass_fields__]
        inside = [hints_of(kind)[name] for kind in owners]
        if is_dataclass(inside[0]):
            together = _joined(inside)
            joined.append((name, together, field(default_factory=together)))
        elif not section_kind(inside[0]) and (choices := _choices(owners, name)):
            first = owners[0].__dataclass_fields__[name]
            both = key(first.default, first.metadata["meaning"], choices=choices)
            joined.append((name, inside[0], both))
    title = "".join(kind.__name__ for kind in kinds)
    return make_dataclass(title, joined, bases=tuple(kinds), frozen=True)


def _choices(owners: Iterable[Any], name: str) -> tuple[Any, ...]:
    found: dict[Any, None] = {}
    for owner in owners:
        found |= dict.fromkeys(owner.__dataclass_fields__[name].metadata["bounds"].choices)
    return tuple(found)


def check(config: Any) -> None:
    """Refuse combinations of values that are impossible.

    Raises:
        ConfigError: one line that names the key.
    """
    common.check(config)
    reading.check(config)
    rewards.check(config)
    simultaneous.check(config)
