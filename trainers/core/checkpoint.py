"""Checkpoints: written aside, checksummed, then renamed, so that what is there is whole."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

from tqdm import tqdm

from recipes.errors import CheckpointError, one_line
from trainers.core import distributed, random_states
from trainers.core.files import checksums, damage, flush, inside, write_together

MANIFEST = "manifest.json"
# Of the files; the manifests of older forms lack it.
FORM = 2
# The folder of the optimizer's state.
STATE = "state"
STEP = re.compile(r"step_\d+")


def save(
    run_dir: Path, step: int, engine, tokenizer, stop_ids, facts: dict, keep: int, base: str = ""
) -> Path:
    """Write `checkpoints/step_N`: the optimizer's state, random states, the model, adapters.

    A collective. The folder gets its name only when every file is written and listed with its
    checksum. Older checkpoints beyond `keep` are removed after that.

    Args:
        run_dir: the run directory.
        step: N.
        engine: the `PolicyEngine`.
        tokenizer: goes into the model's folder.
        stop_ids: end tokens, which go there too.
        facts: what must agree at a resume, by name (`trainers.prepare.resume_facts`).
        keep: how many checkpoints stay, this one included.
        base: the model that LoRA's adapters belong to, a folder or hub name.

    Returns:
        the checkpoint's folder.

    Raises:
        CheckpointError: a rank cannot write a file, or rank 0 does not see one; on all ranks.
    """
    folder = run_dir / "checkpoints" / f"step_{step}"
    partial = folder.with_name(f".{folder.name}.partial")
    about = {"form": FORM, "step": step, "ranks": distributed.world_size(), **facts}
    first = distributed.rank() == 0
    try:
        write_together(folder, lambda: remove_leftovers(run_dir) if first else None)
        files = _write(folder, partial, engine, tokenizer, stop_ids, base)
        (listed,) = write_together(folder, lambda: _listed(files, partial))
        by_rank = distributed.gather(listed)
        _check_shared(partial, by_rank)
        write_together(folder, lambda: _finish(folder, partial, about, by_rank) if first else None)
    except CheckpointError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if first:
        # Later ones stay: they are of another attempt, and the new one must not go for them.
        earlier = [path for path in complete(run_dir) if step_of(path) < step]
        for old in earlier[: len(earlier) - keep + 1]:
            _discard(old)
    distributed.barrier()
    return folder


def _write(folder: Path, partial: Path, engine, tokenizer, stop_ids, base: str) -> list[Path]:
    """Write this rank's files of a checkpoint aside; returns them. A collective."""

    def write_state() -> list[Path]:
        (partial / STATE).mkdir(parents=True, exist_ok=True)
        return engine.save_state(partial / STATE)

    def write_model() -> list[Path]:
        engine.save_model(partial / "model", tokenizer, stop_ids)
        return inside(partial / "model") if distributed.rank() == 0 else []

    def write_adapters() -> list[Path]:
        if engine.adapted:
            engine.save_adapters(partial / "adapter", base)
        return inside(partial / "adapter") if distributed.rank() == 0 else []

    def write_random() -> list[Path]:
        return [random_states.save(partial)]

    writes = (write_state, write_model, write_adapters, write_random)
    return list(itertools.chain(*write_together(folder, *writes)))


def _listed(files: list[Path], partial: Path) -> dict[str, list]:
    """[bytes, checksum] of this rank's files, by their paths; now they are on the disk."""
    for path in files:
        flush(path)
    return dict(zip((str(path.relative_to(partial)) for path in files), checksums(files)))


def _check_shared(folder: Path, by_rank: list[dict[str, list]]) -> None:
    """See that the files of all ranks are in the folder that rank 0 completes. A collective.

    Args:
        folder: of the checkpoint.
        by_rank: each rank's files, by their paths inside it.

    Raises:
        CheckpointError: rank 0 does not see a file, on any rank.
    """
    absent = [
        (rank, name)
        for rank, names in enumerate(by_rank)
        for name in sorted(names)
        if not (folder / name).is_file()
    ]
    if of_rank_0 := distributed.gather(absent)[0]:
        rank, name = of_rank_0[0]
        raise CheckpointError(
            f"checkpoint file {folder / name} of rank {rank} is not where rank 0 writes; run.dir "
            "must be one folder for all ranks, on a file system that they share"
        )


def _finish(folder: Path, partial: Path, about: dict, by_rank: list[dict[str, list]]) -> None:
    """List all files in `manifest.json`, and give a checkpoint its name.

    Args:
        folder: the name.
        partial: where the checkpoint was written.
        about: what else the manifest says.
        by_rank: each rank's files, with bytes and checksum.
    """
    files = {name: entry for listed in by_rank for name, entry in sorted(listed.items())}
    (partial / MANIFEST).write_text(json.dumps({**about, "files": files}, indent=1))
    folders = [path for path in partial.rglob("*") if path.is_dir()]
    for path in (partial / MANIFEST, *folders, partial):
        flush(path)
    _discard(folder)
    partial.rename(folder)
    flush(folder.parent)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what is left of checkpoints that were being written, or removed."""
    for folder in (run_dir / "checkpoints").glob(".step_*"):
        shutil.rmtree(folder, ignore_errors=True)


def _discard(folder: Path) -> None:
    """Remove a checkpoint; a failure of that is a remark, and is tried again at the next save.

    It loses its name first, so that no half of it is taken for a whole one.
    """
    hidden = folder.with_name(f".{folder.name}.removed")
    try:
        if folder.exists():
            shutil.rmtree(folder.rename(hidden))
    except OSError as error:
        tqdm.write(f"checkpoint {folder} could not be removed ({one_line(error)})")


def complete(run_dir: Path) -> list[Path]:
    """The run's finished checkpoints, oldest first.

    A half-written one has another name and is not among them.
    """
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted((path for path in folders if STEP.fullmatch(path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The N of `step_N`."""
    return int(folder.name.removeprefix("step_"))


def set_aside(run_dir: Path, start: int) -> list[str]:
    """Rename the checkpoints that are later than the step that a run continues after.

    They belong to the attempt that the run goes back behind. Under their names `resume=auto` would
    take them for its own.

    Args:
        run_dir: the run directory.
        start: the step.

    Returns:
        a remark for each.
    """
    remarks = []
    for folder in complete(run_dir):
        if step_of(folder) > start:
            names = (f"{folder.name}.replaced_{number}" for number in itertools.count(1))
            aside = next(path for path in map(folder.with_name, names) if not path.exists())
            folder.rename(aside)
            remarks.append(
                f"resume  {folder} is of an earlier attempt; it is {aside.name} now, and can be "
                "deleted"
            )
    return remarks


def find(path: Path) -> Path:
    """The checkpoint that a path names: a checkpoint's folder, or that of a run, for its newest.

    Raises:
        CheckpointError: the path is neither.
    """
    if (path / MANIFEST).is_file() or (STEP.fullmatch(path.name) and path.is_dir()):
        return path
    checkpoints = complete(path)
    if not checkpoints:
        raise CheckpointError(
            f"resume={path}: no checkpoint there; give a run's folder that has "
            "checkpoints/step_N, or one of those"
        )
    return checkpoints[-1]


def run_of(folder: Path) -> Path | None:
    """The run that a checkpoint's folder belongs to: RUN of RUN/checkpoints/step_N.

    None: it is a copy in another place, or was set aside.
    """
    folder = folder.resolve()
    inside = folder.parent.name == "checkpoints" and STEP.fullmatch(folder.name)
    return folder.parent.parent if inside else None


def verify(folder: Path) -> dict:
    """Check a checkpoint's files before anything loads. A collective: each rank checks a share.

    Args:
        folder: the checkpoint's.

    Returns:
        its manifest: `step`, `ranks`, the facts of its run, `files`.

    Raises:
        CheckpointError: a file is missing or changed, on all ranks; the message names it.
    """
    manifest: dict = {}
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, _ = manifest["files"], manifest["step"]
        by_size = sorted(files, key=lambda name: (files[name][0], name))
        own = by_size[distributed.rank() :: distributed.world_size()]
        problem = damage(folder, {name: files[name] for name in own})
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"checkpoint {folder / MANIFEST} cannot be read ({one_line(error)})"
    if problems := list(filter(None, distributed.gather(problem))):
        raise CheckpointError(problems[0])
    return manifest


def check_facts(folder: Path, manifest: dict, facts: dict) -> None:
    """Compare a run with the one that saved a checkpoint.

    Args:
        folder: the checkpoint's.
        manifest: its own.
        facts: what must agree, by name.

    Raises:
        CheckpointError: a fact differs; the message names it. Or the checkpoint is of an older
            version, whose files could run code as they are read.
    """
    if manifest.get("form") != FORM:
        raise CheckpointError(
            f"checkpoint {folder} was saved by another version of Onstream, in a form that this "
            f"one does not read; train on from its weights with model.path={folder / 'model'}"
        )
    for name, value in facts.items():
        if manifest.get(name) != value:
            raise CheckpointError(
                f"checkpoint {folder} was saved with {name}={manifest.get(name)}, this run has "
                f"{value}; resume with the same"
            )


def load_state(folder: Path, engine) -> None:
    """Restore the weights and the optimizer's state. A collective."""
    engine.load_state(folder / STATE)
