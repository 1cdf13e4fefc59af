"""The run directory: a new one, or that of a run to continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from recipes.compose import flatten
from recipes.errors import ConfigError
from recipes.schema import OLD_VALUES
from trainers.core import checkpoint

# Keys that may differ between a run and its continuation without a remark.
UNREMARKED = ("resume", "run.dir", "dry_run")


def run_directory(
    config, facts: dict[str, Any], messages: list[str]
) -> tuple[Path, Path | None, int]:
    """Choose the run directory, and the checkpoint to continue from.

    Args:
        config: the run's.
        facts: what must agree at a resume, by name.
        messages: remarks to print are appended to it.

    Returns:
        (run directory, checkpoint or None, steps already done).

    Raises:
        ConfigError: the directory already holds another run.
        CheckpointError: the checkpoint cannot be used.
    """
    directory = Path(config.run.dir).expanduser()
    if config.resume is None:
        if (directory / "metrics.jsonl").exists() or (directory / "checkpoints").exists():
            raise ConfigError(
                f"run.dir={directory} already holds a run; continue it with resume=auto, or name "
                "another directory"
            )
        return directory, None, 0
    directory, point = checkpoint.find(config.resume, directory)
    if point is None:
        messages.append(f"resume  no checkpoint in {directory}: from the start")
        return directory, None, 0
    start = checkpoint.verify(point, facts)
    messages.append(f"resume  from {point}")
    for key in changed_keys(directory / "config.yaml", config):
        messages.append(f"resume  {key} differs from the run's config.yaml")
    return directory, point, start


def changed_keys(saved: Path, config) -> list[str]:
    """The keys whose values differ between a run's config.yaml and this config.

    A key that only one of the two has makes no difference: older files also hold the keys of other
    methods, and a value may have had another name.
    """
    if not saved.exists():
        return []
    before = flatten(yaml.safe_load(saved.read_text(encoding="utf-8")))
    now = flatten(config)
    for key, new_names in OLD_VALUES.items():
        if key in before:
            before[key] = new_names.get(before[key], before[key])
    return sorted(
        key
        for key in before.keys() & now.keys()
        if before[key] != now[key] and key not in UNREMARKED
    )
