"""Turns of processes: a lock is waited for in words, and not for ever."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recipes.errors import OnstreamError

# Seconds between two lines of a process that waits.
SAY_EVERY = 20.0
# Seconds. What is done under a lock, as fetching a model or compiling, takes minutes.
LIMIT = 3600.0


def print_now(line: str) -> None:
    """Print a line on stderr at once, also into a pipe."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def turn(file: Path, others: str) -> Iterator[None]:
    """Hold a lock, which the system frees with its process.

    Args:
        file: the lock's.
        others: who may have it, in words.

    Raises:
        OnstreamError: it was not free for an hour.
        OSError: the file cannot be written.
    """
    from filelock import FileLock

    lock = FileLock(file)
    wait(lambda: try_acquire(lock), f"{others} ({file})", print_now)
    try:
        yield
    finally:
        lock.release()


def wait(
    ready: Callable[[], bool], what: str, say: Callable[[str], None], limit: float = LIMIT
) -> None:
    """Return when `ready()` is true. Until then say now and then what is waited for.

    Args:
        ready: is asked twice a second.
        what: is waited for, in words.
        say: takes a line for the user.
        limit: seconds.

    Raises:
        OnstreamError: it was not ready within the limit.
    """
    started, said = time.monotonic(), -math.inf
    while not ready():
        now = time.monotonic()
        if now - started > limit:
            raise OnstreamError(
                f"waited {limit / 60:g} minutes for {what}; end that process if it hangs, and "
                "start again"
            )
        if now - said > SAY_EVERY:
            said = now
            say(f"waiting for {what}")
        time.sleep(0.5)


def try_acquire(lock: Any) -> bool:
    """Take a FileLock if it is free; whether it was."""
    from filelock import Timeout

    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True
