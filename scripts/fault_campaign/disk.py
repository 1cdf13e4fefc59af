"""A disk of a run's own, which can be filled: a tmpfs that only this process and its children
see."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

MEBIBYTES = 256
NEW_MOUNTS, NEW_USERS = 0x00020000, 0x10000000  # of unshare


def private_mounts() -> bool:
    """From now on, mounts of this process are seen by it and its children alone.

    Returns:
        whether the system allows it.
    """
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS if user == 0 else NEW_MOUNTS | NEW_USERS):
        return False
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return _runs("mount", "--make-rprivate", "/")


@contextlib.contextmanager
def own(folder: Path) -> Iterator[None]:
    """`folder` is a disk of `MEBIBYTES`, where the system allows it."""
    size = f"size={MEBIBYTES}m"
    mounted = _runs("mount", "-t", "tmpfs", "-o", size, "faults", str(folder))
    try:
        yield
    finally:
        if mounted:
            _runs("umount", "--lazy", str(folder))


def shared() -> contextlib.nullcontext:
    """The disk that all have."""
    return contextlib.nullcontext()


def _runs(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0
