"""Operators that DeepSpeed compiles on first use, and the lock files of killed compilations.

A run compiles none of them but CPUAdam, and that only where the optimizer is offloaded. PyTorch
guards a compilation with a lock *file*. Nobody removes it when its process is killed, so every
later start would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from recipes.errors import ConfigError
from recipes.locks import try_acquire, wait

Operator = TypeVar("Operator")
# Seconds. A lock this old whose owner's processes cannot be seen is taken for abandoned.
ABANDONED = 600
# Prints a line at once, also into a pipe.
print_now = partial(print, flush=True)


def disable_unused() -> None:
    """Keep DeepSpeed from compiling shared-memory collectives.

    They take one to two minutes at a first start on a CPU. DeepSpeed offers them to gloo wherever
    it finds a compiler. Plain gloo does here, because the updates take a CPU run's time, not the
    collectives.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def check_compiler() -> None:
    """Refuse a run that must compile an operator where there is no C++ compiler.

    Raises:
        ConfigError: there is none.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        raise ConfigError(
            "engine.offload_optimizer=true compiles DeepSpeed's CPUAdam, and there is no C++ "
            f"compiler ({compiler}); install one, or take an engine without offloading"
        )


def compile_once(
    name: str, load: Callable[[], Operator], say: Callable[[str], None] = print_now
) -> Operator:
    """Load an operator that is compiled on its first use, and say so where that is now.

    Ranks and runs take turns. A lock file of PyTorch's that no living process holds is removed.

    Args:
        name: DeepSpeed's name of the operator, as `cpu_adam`.
        load: compiles it, or loads what was compiled.
        say: takes a line for the user.

    Raises:
        OnstreamError: another process has had the lock for an hour.
    """
    from filelock import FileLock
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(name, verbose=False))
    others = f"another process that compiles {name}"
    # The system frees this lock with its process.
    turn = FileLock(folder.with_name(f"{folder.name}.turn"))
    wait(lambda: try_acquire(turn), others, say)
    try:
        wait(lambda: is_free(folder / "lock", say), others, say)
        if not list(folder.glob("*.so")):
            say(
                f"compiling DeepSpeed's {name}, once on this machine; about a minute, into {folder}"
            )
        return load()
    finally:
        turn.release()


def is_free(lock: Path, say: Callable[[str], None]) -> bool:
    """Whether a lock file is gone, or was a dead process's and is removed."""
    try:
        age = time.time() - lock.stat().st_mtime
        holders, hidden = processes_that_hold(lock)
    except FileNotFoundError:
        return True
    if holders or (hidden and age < ABANDONED):
        return False
    say(f"removing {lock}, left {age:.0f} s ago by a process that was killed")
    lock.unlink(missing_ok=True)
    return True


def processes_that_hold(file: Path) -> tuple[list[int], bool]:
    """Which processes have a file open.

    Returns:
        their ids, and whether a Python process of the file's owner is hidden from us.

    Raises:
        FileNotFoundError: there is no such file.
    """
    import psutil

    owner, path = file.stat().st_uid, str(file.resolve())
    holders, hidden = [], False
    for process in psutil.process_iter():
        try:
            if path in (opened.path for opened in process.open_files()):
                holders.append(process.pid)
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            # It may end meanwhile.
            with contextlib.suppress(psutil.Error):
                hidden |= process.uids().real == owner and "python" in process.name()
    return holders, hidden
