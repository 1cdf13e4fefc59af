"""Looks a component up by the name that a recipe gives it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from recipes.errors import ConfigError


def nearest(name: str, valid: Iterable[str]) -> str:
    """The tail of an error message: `; did you mean 'x'?` or the list of valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; one of: {', '.join(names)}"


class Registry(dict[str, str]):
    """The dotted paths of a config key's components, by name.

    An outside module joins without editing this repository: `reward.token=my_package.rewards.mine`
    imports `my_package.rewards` and takes `mine`.

    Args:
        key: the config key; errors show it.
        paths: the built-in components.
    """

    def __init__(self, key: str, paths: Mapping[str, str]):
        super().__init__(paths)
        self.key = key

    def resolve(self, name: str) -> Any:
        """The component called `name`, imported.

        Raises:
            ConfigError: no such registered name, or the dotted path does not import.
        """
        path = self.get(name, name)
        module, _, attribute = path.rpartition(".")
        if not module:
            raise ConfigError(f"{self.key}='{name}' is not known{nearest(name, self)}")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{self.key}='{name}' cannot be imported: {error}") from error
