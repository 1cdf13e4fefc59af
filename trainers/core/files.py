"""A checkpoint's files: known by their checksums, and written through to the disk."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recipes.errors import CheckpointError, one_line
from trainers.core import distributed

# What PyTorch, safetensors and tokenizers say of a file that cannot be written; none is an OSError.
WRITE_ERROR = re.compile(r"os error \d+|basic_ios|unexpected pos|PytorchStreamWriter|iostream")
HASHING_THREADS = 8


def inside(folder: Path) -> list[Path]:
    """All files of a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def checksums(paths: Sequence[Path]) -> list[list]:
    """[bytes, checksum] of each file. Hashing leaves Python free for another thread's."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        return list(pool.map(_checksum, paths))


def _checksum(path: Path) -> list:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return [path.stat().st_size, digest]


def damage(folder: Path, listed: dict[str, list]) -> str:
    """What is wrong with files; an empty text: nothing.

    Args:
        folder: of the checkpoint.
        listed: bytes and checksum by the path inside it.
    """
    for name, (size, _) in listed.items():
        path = folder / name
        if not path.is_file():
            return f"checkpoint file {path} is missing"
        if path.stat().st_size != size:
            return f"checkpoint file {path} is corrupt (it has another size)"
    paths = [folder / name for name in listed]
    for path, found, entry in zip(paths, checksums(paths), listed.values()):
        if found != entry:
            return f"checkpoint file {path} is corrupt (its checksum differs)"
    return ""


def flush(path: Path) -> None:
    """Write a file, or the names in a folder, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_together(folder: Path, *actions: Callable[[], Any]) -> list[Any]:
    """Let each rank do its part of a save. A collective.

    A failure to write ends none of the actions after it, since these may be collectives.

    Args:
        folder: of the checkpoint, for messages.
        actions: what this rank does.

    Returns:
        what the actions returned.

    Raises:
        CheckpointError: a rank could not write; on all ranks.
    """
    problem, results = "", []
    for action in actions:
        try:
            results.append(action())
        except Exception as error:
            if not isinstance(error, OSError) and not WRITE_ERROR.search(str(error)):
                raise
            problem = problem or _write_failure(folder, error)
    if problems := list(filter(None, distributed.gather(problem))):
        raise CheckpointError(problems[0])
    return results


def _write_failure(folder: Path, error: Exception) -> str:
    """The message of a checkpoint that could not be written: folder, reason, free space."""
    there = next(path for path in folder.absolute().parents if path.exists())
    disk = shutil.disk_usage(there)
    return (
        f"checkpoint {folder} could not be written ({one_line(error)}); the disk has "
        f"{disk.free / 2**30:.2f} of {disk.total / 2**30:.2f} GiB free; make room, or "
        "lower checkpoint.keep, and continue with resume=auto"
    )
