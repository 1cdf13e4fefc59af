"""Deadlines: a phase that takes too long ends this process with a reason and a stack.

The loop enters its phases with `with phase("rollout", step):`. A thread compares each with its
deadline, and another one prints a line where nothing was printed for a minute. With several ranks,
`trainers.core.peers` tells which of them the others wait for.

There is one watchdog a process, as there is one main thread. Where none was started, a phase does
nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes.errors import OnstreamError
from trainers.core.last_words import LastWords

# Of a process that ended because a phase was overdue; `timeout` of coreutils gives the same.
EXIT_STATUS = 124
# Seconds without a printed line after which there is one.
QUIET = 60.0
# Seconds after a deadline at which the process ends though Python itself hangs.
BACKSTOP = 20.0
# Seconds that a rank which only waits leaves to the stalled one, to print its stack.
GRACE = 10.0


@dataclass(frozen=True)
class Phase:
    """What the main thread does.

    Attributes:
        name: of a key of the section `deadline`.
        step: the last one begun; None: before the first.
        limit: seconds.
        entered: on the monotonic clock.
    """

    name: str
    step: int | None
    limit: float
    entered: float = field(default_factory=time.monotonic)

    @property
    def place(self) -> str:
        """As `step 3: rollout`."""
        return self.name if self.step is None else f"step {self.step}: {self.name}"

    def seconds(self) -> float:
        return time.monotonic() - self.entered

    def spoken(self, least: float) -> str:
        """As `step 3: rollout for 2 min 10 s`; without the time where it is less than `least`."""
        taken = self.seconds()
        return self.place if taken < least else f"{self.place} for {spoken_time(taken)}"


class Watchdog:
    """Watches this process.

    Args:
        limits: each phase's deadline, seconds.
        say_error: prints an error's one line.
        shown: whether this rank prints: a line where nothing else is printed.
        quiet: seconds without a line, before there is one.
        backstop: seconds after a deadline at which a process ends whose Python hangs.
    """

    def __init__(
        self,
        limits: Mapping[str, float],
        say_error: Callable[[Exception], None],
        shown: bool = True,
        quiet: float = QUIET,
        backstop: float = BACKSTOP,
    ):
        self.limits, self.say_error, self.shown = limits, say_error, shown
        self.quiet, self.backstop = quiet, backstop
        self.tick = min(1.0, quiet / 4, *(limit / 4 for limit in limits.values()))
        self.now: Phase | None = None
        # Phases entered and left so far. All ranks count the same ones.
        self.count = 0
        self.step: int | None = None
        # The innermost phase that an exception came out of.
        self.failed: Phase | None = None
        # An exception is being dealt with, so other ranks' failures are no reason to end at once.
        self.failing = False
        # The run's directory, once there is one.
        self.directory: Path | None = None
        # What is done after an error, each with words.
        self.cleanup: list[tuple[str, Callable[[], object]]] = []
        # The collective that the main thread is in.
        self.waits = ""
        self.heard_at = time.monotonic()
        self.peers: Any = None
        self.closed, self.ends = threading.Event(), threading.Lock()
        self.last_words = LastWords()
        # torchrun's workers belong to it. Any other parent may go, as a shell with nohup does.
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        for watch in (self._watch, self._speak) if shown else (self._watch,):
            threading.Thread(target=watch, daemon=True, name=f"watchdog{watch.__name__}").start()

    @contextlib.contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """The main thread is in a phase; the one around it begins anew after it.

        Args:
            name: a key of `limits`.
            step: None: that of the phase before.
        """
        outer = self.now
        self.failed = None
        self.step = self.step if step is None else step
        self._enter(Phase(name, self.step, self.limits[name]))
        try:
            yield
        except BaseException:
            self.failed = self.failed or self.now
            raise
        finally:
            self._enter(outer and replace(outer, step=self.step, entered=time.monotonic()))

    def _enter(self, phase: Phase | None) -> None:
        self.now = phase
        self.count += 1
        if phase is None:
            faulthandler.cancel_dump_traceback_later()
            return
        end = phase.limit + self.backstop
        self.last_words.leave(overdue(phase, end), phase.limit + self.backstop / 2)
        # It runs without the interpreter's lock, which a call of C code may never give back.
        faulthandler.dump_traceback_later(end, exit=True, file=self.last_words.stacks)

    def connect(self, peers) -> None:
        """Share the phases of all ranks from now on (`trainers.core.peers.Peers`)."""
        self.peers = peers
        peers.start(self)

    def close(self) -> None:
        """Watch no longer. With several ranks, rank 0 waits until all have come here."""
        self._enter(None)
        if self.peers is not None:
            self.peers.close()
        self.closed.set()
        self.last_words.close()

    def tell(self, line: str) -> None:
        """Let all ranks know why this one ends."""
        self.failing = True
        if self.peers is not None:
            self.peers.publish_end(line, [], 1)

    def end(
        self, status: int, line: str, stalled: list[int] | None = None, stacks: bool = True
    ) -> None:
        """End this process and its children, with a line that says why.

        Args:
            status: the exit status.
            line: the reason, and what to do.
            stalled: the ranks that the others wait for; None: this one.
            stacks: print what all threads are at.
        """
        if not self.ends.acquire(blocking=False):
            # Another thread does it.
            return
        # The system's default action ends the process where even printing hangs.
        signal.alarm(int(GRACE + self.backstop) + 1)
        if self.peers is not None:
            self.peers.publish_end(line, stalled or [], status)
        try:
            if stacks:
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            kill_children()
            self.say_error(OnstreamError(line))
            sys.stdout.flush()
            if stalled:
                time.sleep(GRACE)
        finally:
            os._exit(status)

    def _watch(self) -> None:
        """A thread: the deadline, and torchrun's end."""
        while not self.closed.wait(self.tick):
            now = self.now
            if now is not None and now.seconds() > now.limit:
                self._overdue(now)
            if self.torchrun is not None and os.getppid() != self.torchrun:
                # One line: what prints an error under torchrun prints it a second time after it.
                os.environ.pop("TORCHELASTIC_RUN_ID", None)
                place = f" in {now.place}" if now else ""
                self.end(
                    1,
                    f"torchrun (process {self.torchrun}) was killed, and this rank ends{place}; "
                    "continue with resume=auto",
                    stacks=False,
                )

    def _overdue(self, now: Phase) -> None:
        stalled, who = self.peers.stalled(self.count, self.waits) if self.peers else ([], "")
        self.end(EXIT_STATUS, overdue(now, now.seconds(), who), stalled, stacks=not stalled)

    def _speak(self) -> None:
        """A thread of its own, as printing may hang: lines where nothing else is printed."""
        from tqdm import tqdm

        spoken = 0
        while not self.closed.wait(self.tick):
            now, silence = self.now, time.monotonic() - self.heard_at
            due = lines_due(silence / self.quiet)
            if due == 0 or now is None:
                spoken = 0
            elif due > spoken:
                spoken = due
                # Above the bars of a terminal, which may be gone.
                with contextlib.suppress(OSError):
                    tqdm.write(f"… {now.spoken(self.quiet)}", file=sys.stderr)


def overdue(phase: Phase, seconds: float, waits: str = "", host: str = "", pid: int = 0) -> str:
    """The line on a phase that takes too long.

    Args:
        waits: words on the ranks that it waits for.
        host, pid: of the process; of this one where they are left out.
    """
    return (
        f"{phase.place} has taken {spoken_time(seconds)} (process {pid or os.getpid()} on "
        f"{host or socket.gethostname()}), more than deadline.{phase.name}={phase.limit / 60:g} "
        f"minutes{waits}; raise the key where that is normal, and continue with resume=auto"
    )


def lines_due(minutes: float) -> int:
    """How many lines a silence of so many minutes gets: each minute up to 10, then every 10."""
    return int(minutes) if minutes < 10 else 10 + int((minutes - 10) / 10)


def spoken_time(seconds: float) -> str:
    """As `45 s`, `2 min 10 s` or `3 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole // 60 % 60} min"


def kill_children() -> None:
    """End every process that this one has started, and those that these have."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


_active: Watchdog | None = None


@contextlib.contextmanager
def watching(deadline, say_error: Callable[[Exception], None]) -> Iterator[Watchdog]:
    """Watch this process while the context lasts.

    Args:
        deadline: the config's section.
        say_error: prints an error's one line.
    """
    global _active
    limits = {name: 60 * minutes for name, minutes in deadline.phases().items()}
    shown = os.environ.get("RANK", "0") == "0"
    _active = dog = Watchdog(limits, say_error, shown)
    try:
        yield dog
    finally:
        dog.close()
        _active = None


def active() -> Watchdog | None:
    """This process's watchdog; None: there is none."""
    return _active


def phase(name: str, step: int | None = None) -> contextlib.AbstractContextManager[None]:
    """The main thread is in a phase (`Watchdog.phase`)."""
    return contextlib.nullcontext() if _active is None else _active.phase(name, step)


def during(name: str) -> Callable[[Callable], Callable]:
    """A function whose calls are a phase, of the step of the phase before."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def inside(*arguments, **named):
            with phase(name):
                return function(*arguments, **named)

        return inside

    return decorate


@contextlib.contextmanager
def waiting(collective: str) -> Iterator[None]:
    """The main thread waits for other ranks."""
    dog = _active
    if dog is None:
        yield
        return
    dog.waits = collective
    try:
        yield
    finally:
        dog.waits = ""


def heard() -> None:
    """A line was printed, or a bar has moved."""
    if _active is not None:
        _active.heard_at = time.monotonic()
