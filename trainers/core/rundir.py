"""The run directory: a new one, or that of a run to continue."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import yaml

from recipes.compose import flatten
from recipes.errors import CheckpointError, ConfigError
from recipes.schema import OLD_VALUES
from trainers.core import checkpoint, distributed

# As in the default of run.dir.
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")
# The config of a run up to the step of a resume.
EARLIER = re.compile(r"config\.(\d+)\.yaml")
# Keys in which a run must agree with an earlier one to be taken for it, beside all of `data`.
IDENTITY = ("recipe", "trainer", "model.path", "seed")
# Keys that may differ between a run and its continuation without a remark.
UNREMARKED = ("resume", "run.dir", "dry_run")


def run_directory(
    config, facts: dict[str, Any], messages: list[str]
) -> tuple[Path, Path | None, int]:
    """Choose the run directory, and the checkpoint to continue from. A collective at a resume.

    `resume=auto` continues the run in `run.dir`. The default `run.dir` is named after the time, and
    so is always new; then it continues the newest run beside it that trains the same. A path
    continues the run that the checkpoint belongs to, unless `run.dir` names another directory: that
    is a new run, which starts from the checkpoint.

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
        _check_unused(directory)
        return directory, None, 0
    # The ranks share the checking of a checkpoint.
    distributed.setup_if_several()
    if config.resume == "auto":
        if _is_default(directory):
            # Each rank read the time for itself.
            directory = distributed.gather(_same_run(directory, config, messages))[0]
        point, manifest = _newest(directory, messages)
        if point is None:
            messages.append(f"resume  no checkpoint in {directory}: from the start")
            return directory, None, 0
        source: Path | None = directory
    else:
        point = _named(Path(config.resume).expanduser())
        manifest = _verified(point)
        source = checkpoint.run_of(point)
        directory = _continued(source, directory)
    checkpoint.check_facts(point, manifest, facts)
    start = manifest["step"]
    if source is None or directory.resolve() != source.resolve():
        messages.append(f"resume  {directory} is a new run, whose records begin at {start + 1}")
    messages.append(f"resume  from {point}")
    if manifest["ranks"] != distributed.world_size():
        messages.append(
            f"resume  {point.name} was saved by {manifest['ranks']} ranks, this run has "
            f"{distributed.world_size()}: sums are rounded otherwise"
        )
    if source is not None:
        for key in changed_keys(config_at(source, start), config):
            messages.append(f"resume  {key} differs from the run's config.yaml")
    return directory, point, start


def _check_unused(directory: Path) -> None:
    """Raises ConfigError: a run is there."""
    if (directory / "metrics.jsonl").exists() or (directory / "checkpoints").exists():
        raise ConfigError(
            f"run.dir={directory} already holds a run; continue it with resume=auto, or name "
            "another directory"
        )


def _is_default(directory: Path) -> bool:
    """Whether `run.dir` was left to its default."""
    return TIMESTAMP.fullmatch(directory.name) is not None and not directory.exists()


def _continued(source: Path | None, directory: Path) -> Path:
    """The run directory of a resume from a checkpoint that was named.

    Args:
        source: the run that the checkpoint belongs to; None: to none.
        directory: `run.dir`.

    Raises:
        ConfigError: `run.dir` holds another run.
    """
    if source is not None and _is_default(directory):
        return source
    if source is None or directory.resolve() != source.resolve():
        _check_unused(directory)
    return directory


def _agreed(points: list[Path], where: Path) -> list[Path]:
    """The checkpoints that a rank found, if each rank found the same. A collective.

    Args:
        points: this rank's.
        where: where it looked.

    Raises:
        CheckpointError: ranks differ; on all of them.
    """
    found = distributed.gather([point.name for point in points])
    for rank, names in enumerate(found):
        if names != found[0]:
            texts = [" and ".join(names) or "no checkpoint" for names in (names, found[0])]
            raise CheckpointError(
                f"rank {rank} finds {texts[0]} in {where}, rank 0 finds {texts[1]}; run.dir and "
                "resume must be the same folders for all ranks, on a file system that they share"
            )
    return points


def _named(path: Path) -> Path:
    """The checkpoint of `resume=PATH`. A collective. Raises CheckpointError: there is none."""
    try:
        points, problem = [checkpoint.find(path)], None
    except CheckpointError as error:
        points, problem = [], error
    if not any(distributed.gather(points)) and problem is not None:
        raise problem
    return _agreed(points, path)[0]


def _newest(directory: Path, messages: list[str]) -> tuple[Path | None, dict]:
    """The newest whole checkpoint of a run, and its manifest; None: there is no checkpoint.

    Raises:
        CheckpointError: the run has checkpoints, and all are damaged.
    """
    damage: list[str] = []
    for point in reversed(_agreed(checkpoint.complete(directory), directory)):
        try:
            manifest = checkpoint.verify(point)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        messages += [f"resume  {text}; an earlier one is taken" for text in damage]
        return point, manifest
    if damage:
        raise CheckpointError(
            f"{damage[0]}, and no other checkpoint of the run is whole; delete "
            f"{directory / 'checkpoints'} to start from the beginning"
        )
    return None, {}


def _same_run(new: Path, config, messages: list[str]) -> Path:
    """The newest run beside `new` that trains the same; `new` itself where there is none.

    A run of the default `run.dir` is named after its time. It counts once it has a checkpoint.
    """
    runs = [
        folder
        for folder in new.parent.glob("*")
        if TIMESTAMP.fullmatch(folder.name) and checkpoint.complete(folder)
    ]
    for run in sorted(runs, reverse=True):
        if (run / "config.yaml").is_file() and not _other_identity(run, config):
            return run
    if runs:
        other = ", ".join(_other_identity(max(runs), config)) or "no config.yaml"
        messages.append(f"resume  {max(runs)} is another run (differs: {other}) and stays as it is")
    return new


def _other_identity(run: Path, config) -> list[str]:
    """The keys in which a run is another one."""
    keys = changed_keys(run / "config.yaml", config)
    return [key for key in keys if key in IDENTITY or key.startswith("data.")]


def _verified(point: Path) -> dict:
    """The manifest of a checkpoint. Raises CheckpointError: it is damaged."""
    try:
        return checkpoint.verify(point)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_remedy(point)}") from error


def _remedy(point: Path) -> str:
    """What to do about a checkpoint that is damaged."""
    run = checkpoint.run_of(point)
    if run is None:
        return "copy that folder again, or take another checkpoint"
    step = checkpoint.step_of(point)
    before = [path for path in checkpoint.complete(run) if checkpoint.step_of(path) < step]
    if before:
        return f"go on from the one before it with resume={before[-1]}"
    return "the run has none before it; without that folder resume=auto starts from the beginning"


def earlier_configs(run: Path) -> dict[int, Path]:
    """The files config.N.yaml of a run, by N: the config of the steps up to N."""
    matches = ((EARLIER.fullmatch(path.name), path) for path in run.glob("config.*.yaml"))
    return {int(match[1]): path for match, path in matches if match}


def config_at(run: Path, step: int) -> Path:
    """The file that holds the config which a run trained a step with."""
    files = earlier_configs(run)
    ends = [end for end in files if end >= step]
    return files[min(ends)] if ends else run / "config.yaml"


def recorded(run: Path, name: str) -> Any:
    """The last value that a run's metrics.jsonl has of a metric; None: it has none."""
    file = run / "metrics.jsonl"
    value = None
    if file.exists():
        with file.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                # A line may be cut off.
                with contextlib.suppress(ValueError):
                    value = json.loads(line).get(name, value)
    return value


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
