"""Processes that are forked from one which has loaded everything: how each of them ended."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Seconds that helpers of a killed run have to notice its end.
GRACE = 5.0
PARENT_DEATH_SIGNAL = 1  # of prctl


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: its exit status; negative: the signal that ended it.
        seconds: how long it ran.
        hung: it went past its deadline, and was killed.
        out: what it wrote on stdout.
        error: what it wrote on stderr.
        left: processes of its session that outlived it, as `PID COMMAND`.
    """

    status: int
    seconds: float
    hung: bool
    out: str
    error: str
    left: tuple[str, ...]

    @property
    def message(self) -> str:
        """The last line on stderr; empty where there is none."""
        lines = [line for line in self.error.splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""

    @property
    def line(self) -> str:
        """The last line on stderr, where it is that of an error."""
        return self.message if self.message.startswith("error") else ""

    @property
    def how(self) -> str:
        """The end in words: `exit 1`, `SIGKILL`, `hung`."""
        if self.hung:
            return "hung"
        return f"exit {self.status}" if self.status >= 0 else signal.Signals(-self.status).name


@dataclass
class Child:
    """A process that was started, with the files of its output."""

    pid: int
    log: Path
    started: float

    def wait(self, deadline: float) -> Ended:
        """Its end. After `deadline` seconds it is killed, and its stacks are in `error`."""
        handle = os.pidfd_open(self.pid)
        left = max(0.0, deadline - (time.monotonic() - self.started))
        hung = not select.select([handle], [], [], left)[0]
        os.close(handle)
        if hung:
            os.kill(self.pid, signal.SIGUSR2)  # faulthandler writes the stacks
            time.sleep(0.5)
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self.started
        survivors = outlived(self.pid)
        out, error = (self.log.with_suffix(end).read_text(errors="replace") for end in ENDS)
        return Ended(os.waitstatus_to_exitcode(status), seconds, hung, out, error, survivors)


ENDS = (".out", ".err")


def start(work: Callable[[], None], log: Path) -> Child:
    """Fork a process that does `work` in a session of its own, and dies with this one.

    Args:
        work: may raise SystemExit, as a command does.
        log: without an ending; `.out` and `.err` hold its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    pid = os.fork()
    if pid:
        return Child(pid, log, started)
    os.setsid()
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, end in enumerate(ENDS, start=1):
        file = os.open(log.with_suffix(end), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, number)
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    os._exit(status_of(work))


def status_of(work: Callable[[], None]) -> int:
    """Do `work`, and end as the interpreter does at the end of a command; the exit status."""
    status = 0
    try:
        work()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def outlived(session: int) -> tuple[str, ...]:
    """The processes of a session that are still there after `GRACE` seconds; they are killed."""
    end = time.monotonic() + GRACE
    while (members := _members(session)) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in members:
        os.kill(pid, signal.SIGKILL)
    return tuple(f"{pid} {name}" for pid, name in members.items())


def _members(session: int) -> dict[int, str]:
    """The living processes of a session, with their commands."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except OSError:
            continue  # it has just ended
        name, _, rest = text.partition("(")[2].rpartition(")")
        state, _, _, of = rest.split()[:4]
        if int(of) == session and state not in "ZX":
            found[int(folder.name)] = name
    return found
