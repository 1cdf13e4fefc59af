"""Checkpoints: written aside, checksummed, then renamed, so that what is there is whole."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from recipes.errors import CheckpointError
from trainers.core import distributed

MANIFEST = "manifest.json"
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")  # as in run.dir's default


def save(run_dir: Path, step: int, engine, tokenizer, stop_ids, facts: dict, keep: int) -> Path:
    """Write `checkpoints/step_N`: DeepSpeed's state, random states, the model as a Hugging Face
    folder.

    A collective. The folder gets its name only when every file is written and listed with its
    checksum; older ones beyond `keep` are removed after that.

    Args:
        facts: what must agree at a resume: number of ranks, ZeRO stage.
    """
    folder = run_dir / "checkpoints" / f"step_{step}"
    partial = folder.with_name(f".{folder.name}.partial")
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    engine.save_state(partial)
    engine.save_model(partial / "model", tokenizer, stop_ids)
    torch.save(random_states(), partial / f"random_{distributed.rank()}.pt")
    distributed.barrier()
    if distributed.rank() == 0:
        files = {
            str(path.relative_to(partial)): [path.stat().st_size, _digest(path)]
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        (partial / MANIFEST).write_text(
            json.dumps({"step": step, **facts, "files": files}, indent=1)
        )
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in complete(run_dir)[:-keep]:
            shutil.rmtree(old)
    distributed.barrier()
    return folder


def complete(run_dir: Path) -> list[Path]:
    """The run's finished checkpoints, oldest first. A half-written one has another name and is not
    among them."""
    found = [
        (int(match[1]), path)
        for path in (run_dir / "checkpoints").glob("step_*")
        if (match := re.fullmatch(r"step_(\d+)", path.name))
    ]
    return [path for _, path in sorted(found)]


def find(resume: str, run_dir: Path) -> tuple[Path, Path | None]:
    """Which run to continue and from which checkpoint (None: from its start).

    Args:
        resume: `auto` (the newest checkpoint of `run_dir`, or a fresh start), or a run's or
            checkpoint's folder.
        run_dir: the run's directory. If it is the default, named after the time and so always new,
            `auto` takes the newest run beside it that has a checkpoint.

    Raises:
        CheckpointError: the path is neither.
    """
    if resume == "auto":
        if TIMESTAMP.fullmatch(run_dir.name) and not run_dir.exists():
            runs = sorted(
                d for d in run_dir.parent.glob("*") if TIMESTAMP.fullmatch(d.name) and complete(d)
            )
            run_dir = runs[-1] if runs else run_dir
        checkpoints = complete(run_dir)
        return run_dir, checkpoints[-1] if checkpoints else None
    path = Path(resume).expanduser()
    if (path / MANIFEST).is_file() or (re.fullmatch(r"step_\d+", path.name) and path.is_dir()):
        return path.resolve().parent.parent, path
    checkpoints = complete(path)
    if not checkpoints:
        raise CheckpointError(
            f"resume={resume}: no checkpoint there; give a run's folder that has "
            "checkpoints/step_N, or one of those"
        )
    return path, checkpoints[-1]


def verify(folder: Path, facts: dict) -> int:
    """Check a checkpoint before anything loads.

    Returns:
        its step.

    Raises:
        CheckpointError: a file is missing or changed, or the run differs in `facts`; the message
            names it.
    """
    remedy = "delete that folder to resume from the one before it"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {folder / MANIFEST} cannot be read ({error}); {remedy}"
        ) from error
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint file {path} is missing; {remedy}")
        if path.stat().st_size != size or _digest(path) != digest:
            raise CheckpointError(
                f"checkpoint file {path} is corrupt (its checksum differs); {remedy}"
            )
    for name, value in facts.items():
        if manifest.get(name) != value:
            raise CheckpointError(
                f"checkpoint {folder} was saved with {name}={manifest.get(name)}, this run has "
                f"{value}; resume with the same"
            )
    return manifest["step"]


def load(folder: Path, engine) -> None:
    """Restore parameters, optimizer and random states. A collective."""
    engine.load_state(folder)
    set_random_states(torch.load(folder / f"random_{distributed.rank()}.pt", weights_only=False))


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
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
