"""The lock of a run directory: one run at a time writes into it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from recipes.errors import ConfigError, one_line
from trainers.core import distributed


def hold(directory: Path):
    """Lock a run directory for as long as this process lives. A collective.

    Rank 0 has the lock, and the system frees it with its process, however that ends.

    Args:
        directory: the run's; it is made.

    Returns:
        the lock of rank 0, which must be kept; None on other ranks.

    Raises:
        ConfigError: another process has it; the message names it. Or nothing can be written there.
    """
    lock, problem = acquire(directory) if distributed.rank() == 0 else (None, "")
    problem = distributed.gather(problem)[0]
    if problem:
        raise ConfigError(problem)
    return lock


def acquire(directory: Path):
    """The lock, and an empty text; or None, and the line that says who has it or what is wrong."""
    from filelock import FileLock, Timeout

    owner = directory / ".lock.owner"
    lock = FileLock(directory / ".lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        return None, f"run.dir={directory}: {who} writes into it; wait, or name another directory"
    except OSError as error:
        return None, cannot_write(directory, error)
    return lock, ""


def cannot_write(directory: Path, error: OSError) -> str:
    """The line that says why a run directory cannot be used."""
    return (
        f"run.dir={directory} cannot be written to ({one_line(error)}); make room or give access, "
        "or name another directory"
    )
