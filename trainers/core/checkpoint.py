"""Checkpoints: written aside, checksummed, then renamed, so that what is there is whole."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from recipes.errors import CheckpointError, one_line
from trainers.core import distributed

MANIFEST = "manifest.json"
# Facts that manifests of older versions lack.
ADDED = ("model.dtype", "engine.offload_optimizer", "engine.offload_params")
# What PyTorch, safetensors and tokenizers say of a file that cannot be written; none is an OSError.
WRITE_ERROR = re.compile(r"os error \d+|basic_ios|unexpected pos|PytorchStreamWriter|iostream")
STEP = re.compile(r"step_\d+")


def save(
    run_dir: Path, step: int, engine, tokenizer, stop_ids, facts: dict, keep: int, base: str = ""
) -> Path:
    """Write `checkpoints/step_N`: DeepSpeed's state, random states, the model, adapters.

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
        CheckpointError: a file cannot be written, or rank 0 does not see the files of another rank.
    """
    folder = run_dir / "checkpoints" / f"step_{step}"
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if distributed.rank() == 0:
            remove_leftovers(run_dir)
            partial.mkdir(parents=True)
        distributed.barrier()
        engine.save_state(partial)
        engine.save_model(partial / "model", tokenizer, stop_ids)
        if engine.adapted:
            engine.save_adapters(partial / "adapter", base)
        torch.save(random_states(), partial / f"random_{distributed.rank()}.pt")
        _check_shared(partial)
        if distributed.rank() == 0:
            manifest = {"step": step, **facts, "files": _checksums(partial)}
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
            _flush(partial)
            _discard(folder)
            partial.rename(folder)
            _flush_one(folder.parent)
    except CheckpointError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not WRITE_ERROR.search(str(error)):
            raise
        message = _write_failure(folder, error)
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(message) from error
    if distributed.rank() == 0:
        # Later ones stay: they are of another attempt, and the new one must not go for them.
        earlier = [path for path in complete(run_dir) if step_of(path) < step]
        for old in earlier[: len(earlier) - keep + 1]:
            _discard(old)
    distributed.barrier()
    return folder


def _check_shared(folder: Path) -> None:
    """See that the files of all ranks are in the folder that rank 0 completes. A collective.

    Raises:
        CheckpointError: rank 0 does not see a file, on any rank.
    """
    own = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    # Once each rank has listed its files, all are written.
    absent = [
        (rank, name)
        for rank, names in enumerate(distributed.gather(own))
        for name in sorted(names)
        if not (folder / name).is_file()
    ]
    if of_rank_0 := distributed.gather(absent)[0]:
        rank, name = of_rank_0[0]
        raise CheckpointError(
            f"checkpoint file {folder / name} of rank {rank} is not where rank 0 writes; run.dir "
            "must be one folder for all ranks, on a file system that they share"
        )


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


def _write_failure(folder: Path, error: Exception) -> str:
    """The message of a checkpoint that could not be written: folder, reason, free space."""
    there = next(path for path in folder.absolute().parents if path.exists())
    disk = shutil.disk_usage(there)
    return (
        f"checkpoint {folder} could not be written ({one_line(error)}); the disk has "
        f"{disk.free / 2**30:.2f} of {disk.total / 2**30:.2f} GiB free; make room, or "
        "lower checkpoint.keep, and continue with resume=auto"
    )


def _flush(folder: Path) -> None:
    """Write a folder's files and the folders themselves through to the disk."""
    for path in (*folder.rglob("*"), folder):
        _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _checksums(folder: Path) -> dict[str, list]:
    """[bytes, checksum] of every file, by its path inside the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): [path.stat().st_size, _digest(path)] for path in files}


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
    """Check a checkpoint's files before anything loads.

    Args:
        folder: the checkpoint's.

    Returns:
        its manifest: `step`, the facts of its run, `files`.

    Raises:
        CheckpointError: a file is missing or changed; the message names it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files, _ = manifest["files"], manifest["step"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {folder / MANIFEST} cannot be read ({one_line(error)})"
        ) from error
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint file {path} is missing")
        if path.stat().st_size != size or _digest(path) != digest:
            raise CheckpointError(f"checkpoint file {path} is corrupt (its checksum differs)")
    return manifest


def check_facts(folder: Path, manifest: dict, facts: dict) -> None:
    """Compare a run with the one that saved a checkpoint.

    Args:
        folder: the checkpoint's.
        manifest: its own.
        facts: what must agree, by name. One of `ADDED` may be absent from the manifest.

    Raises:
        CheckpointError: a fact differs; the message names it.
    """
    for name, value in facts.items():
        if name in ADDED and name not in manifest:
            continue
        if manifest.get(name) != value:
            raise CheckpointError(
                f"checkpoint {folder} was saved with {name}={manifest.get(name)}, this run has "
                f"{value}; resume with the same"
            )


def load(folder: Path, engine) -> None:
    """Restore parameters, optimizer and random states. A collective."""
    engine.load_state(folder)
    path = folder / f"random_{distributed.rank()}.pt"
    # The states of `random` and NumPy are no tensors.
    set_random_states(torch.load(path, weights_only=False))


def random_states() -> dict:
    """The state of every generator a run may draw from."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict) -> None:
    """Restore what `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
