"""All cases, the components that have none, and the choice of one component."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kernels.policy_loss import OBJECTIVES
from recipes.components import TOKEN_REWARDS, TOKEN_SCORES, TRAINERS, VERIFIERS
from recipes.errors import ConfigError
from recipes.registry import nearest
from recipes.schema import GROUPS, keys_of
from trainers.conformance import (
    engines,
    groups,
    objectives,
    offline,
    outside,
    streaming,
    supervised,
    token_rewards,
    verifiers,
)
from trainers.conformance.report import Case, Difference

# Keys whose values are objectives, or change one: of the whole config, or of these sections.
WHOLE = ("objective", "train.normalizer")
SECTIONS = ("reward", "divergence", "grpo", "hrpo", "proactive")
# Keys there that change no loss.
OTHERS = {"proactive.schedule": "it draws what is read when, and the loss is that of any schedule"}


def components() -> list[str]:
    """Every component that must have a case, as `key=name`."""
    found = [
        f"{registry.key}={name}"
        for registry in (TRAINERS, TOKEN_REWARDS, TOKEN_SCORES, VERIFIERS)
        for name in registry
    ]
    found += [f"loss.objective={name}" for name in OBJECTIVES]
    for config in GROUPS.values():
        for key in keys_of(config).values():
            section = key.name.partition(".")[0]
            chosen = key.name in WHOLE or (section in SECTIONS and key.name not in OTHERS)
            if chosen:
                found += [f"{key.name}={value}" for value in key.bounds.choices]
    return list(dict.fromkeys(found))


def cases() -> list[Case]:
    """All cases; a component without one has a case that fails."""
    found: list[Case] = []
    for module in (
        token_rewards,
        objectives,
        groups,
        streaming,
        supervised,
        offline,
        verifiers,
        engines,
    ):
        found += module.cases()
    # On-policy distillation is what its rewards and objectives are.
    opd = token_rewards.method("reward.token=power", component="trainer=opd")
    found += opd.cases("reward.token=power")
    return [*found, *missing(found)]


def missing(found: Sequence[Case]) -> Iterator[Case]:
    """A failing case for each component that none of these cases is about."""
    covered = {case.component for case in found}
    for component in components():
        if component not in covered:
            yield Case(component, "has a case", "", _no_case)


def _no_case() -> None:
    raise Difference("no case checks it; add one in trainers/conformance")


def chosen(values: dict[str, str]) -> list[Case]:
    """The cases of what a user names.

    Args:
        values: the component's key with its name, and other keys of the config; empty for all.

    Raises:
        ConfigError: no component is named, or it is not known.
    """
    if not values:
        return cases()
    for key in outside.REGISTRIES:
        if "." in values.get(key, ""):
            others = [f"{name}={value}" for name, value in values.items() if name != key]
            return list(outside.cases(key, values[key], others))
    wanted = {f"{key}={value}" for key, value in values.items()}
    found = cases()
    known = {case.component for case in found}
    if unknown := sorted(wanted - known):
        raise ConfigError(f"{unknown[0]} is no component with cases{nearest(unknown[0], known)}")
    return [case for case in found if case.component in wanted]
