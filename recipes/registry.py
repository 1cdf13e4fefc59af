"""Looks a component up by the name a recipe gives it: a registered name, or a dotted path into any
module."""

from __future__ import annotations

import difflib
import importlib
from typing import Any, Iterable

from recipes.errors import ConfigError


def nearest(name: str, valid: Iterable[str]) -> str:
    """The tail of an error message: `; did you mean 'x'?` or the list of valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; one of: {', '.join(names)}"


class Registry(dict):
    """A table of named components for one config key, `key` being the name that errors show.

    An outside module joins without editing this repository: `reward.token=my_package.rewards.mine`
    imports `my_package.rewards` and takes `mine`.
    """

    def __init__(self, key: str):
        super().__init__()
        self.key = key

    def register(self, name: str):
        """Decorator: file the class or function under `name`."""

        def file(component):
            self[name] = component
            return component

        return file

    def resolve(self, name: str) -> Any:
        """The component called `name`.

        Raises:
            ConfigError: no such registered name, or the dotted path does not import.
        """
        if name in self:
            return self[name]
        module, _, attribute = name.rpartition(".")
        if not module:
            raise ConfigError(f"{self.key}='{name}' is not known{nearest(name, self)}")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{self.key}='{name}' cannot be imported: {error}") from error
