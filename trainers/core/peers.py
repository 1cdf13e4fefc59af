"""What ranks know of one another: each one's phase, and why one ended.

Each rank has a thread with a connection of its own to the store that the process group was made
with. The thread writes the rank's phase there, and reads those of the others. So it notices a rank
that is overdue, one that was killed on the same machine, and one that has said why it ends. That
holds without torchrun too, and where the others wait in a collective.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

from trainers.core.watchdog import EXIT_STATUS, GRACE, Phase, Watchdog, overdue

# Seconds between two looks; longer with many ranks, which share one store.
EVERY = 2.0
# Seconds after a deadline in which a rank has ended itself, if it can.
LATE = 30.0
# Seconds without the store after which rank 0, or torchrun, counts as gone.
STORE_GONE = 30.0
# Seconds that rank 0, which may hold the store, waits for the ends of the others.
LEAVE = 60.0
# At most so many ranks are named.
NAMED = 8


class Peers:
    """The thread of one rank.

    Args:
        store: a connection that nothing else uses.
        rank, world: this rank, and the number of ranks.
        every: seconds between two looks.
    """

    def __init__(self, store, rank: int, world: int, every: float | None = None):
        self.store, self.rank, self.world = store, rank, world
        self.every = every or max(EVERY, world / 16)
        self.others = [other for other in range(world) if other != rank]
        # What ranks have written, by rank, and when its phase was first seen here.
        self.states: dict[int, dict[str, Any]] = {}
        self.seen: dict[int, tuple[int, float]] = {}
        self.suspects: set[int] = set()
        # Why another rank has ended.
        self.failure = ""
        self.failed = threading.Event()
        # It has been read here that all must end.
        self.told = False
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name="watchdog_peers")

    def start(self, dog: Watchdog) -> None:
        """Begin; `dog` is this rank's."""
        self.dog = dog
        self.machine = _machine()
        self.thread.start()

    def close(self) -> None:
        """This rank has done its work. Rank 0 waits a while for the others to say so."""
        self.closing.set()
        if self.thread is not threading.current_thread():
            self.thread.join(LEAVE + self.every)

    def publish_end(self, line: str, stalled: list[int], status: int) -> None:
        """Tell all ranks why this one ends, within a few seconds.

        Args:
            line: the reason.
            stalled: the ranks that are at fault; they print their stacks.
            status: the exit status.
        """
        end = {"rank": self.rank, "line": line, "stalled": stalled, "status": status}

        def publish() -> None:
            # The first reason counts.
            self.store.compare_set("end", "", json.dumps(end))

        # The store may hang.
        thread = threading.Thread(target=_quietly(publish), daemon=True)
        thread.start()
        thread.join(5)

    def stalled(self, count: int, waits: str) -> tuple[list[int], str]:
        """The ranks that this overdue one waits for, and words on them.

        Args:
            count: of this rank's phases.
            waits: the collective that it is in; empty: none.
        """
        others = {rank: state for rank, state in self.states.items() if rank != self.rank}
        found = [
            rank
            for rank, state in others.items()
            if not state["closed"]
            and (
                state["count"] < count or (waits and state["count"] == count and not state["waits"])
            )
        ]
        if not found:
            return [], ""
        words = [f"rank {rank} ({_words(others[rank])})" for rank in found[:NAMED]]
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        return found, f"; it waits for {', '.join(words)}{more}"

    def _run(self) -> None:
        lost: float | None = None
        while True:
            closing = self.closing.wait(self.every)
            try:
                self._write(closed=closing)
                self._read()
                lost = None
            except RuntimeError as error:
                # torch has no other kind for a store that is gone.
                if closing:
                    return
                lost = lost or time.monotonic()
                self._find_dead()
                if time.monotonic() - lost > STORE_GONE:
                    self._fail(f"the store of the process group is gone ({_first_line(error)})")
            if closing:
                self._leave()
                return

    def _leave(self) -> None:
        """The last rank to leave is rank 0: the store may be in its process."""
        until = time.monotonic() + LEAVE
        while self.rank == 0 and time.monotonic() < until:
            states = [self.states.get(other) for other in self.others]
            if all(state and (state["closed"] or state["told"]) for state in states):
                return
            time.sleep(min(self.every, 0.2))
            _quietly(self._read_states)()

    def _write(self, closed: bool) -> None:
        now, waits = self.dog.now, self.dog.waits
        state = {
            "count": self.dog.count,
            "phase": now.name if now else "",
            "step": now.step if now else None,
            "limit": now.limit if now else 0,
            "waits": waits,
            "closed": closed,
            "told": self.told,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "machine": self.machine,
        }
        if state != self.states.get(self.rank):
            self.store.set(f"rank_{self.rank}", json.dumps(state))
            self.states[self.rank] = state

    def _read_states(self) -> None:
        keys = [f"rank_{other}" for other in self.others]
        # Before all have written, reading would wait.
        if not self.store.check(keys):
            return
        for other, text in zip(self.others, self.store.multi_get(keys)):
            state = self.states[other] = json.loads(text)
            if self.seen.get(other, (None, 0))[0] != state["count"]:
                self.seen[other] = (state["count"], time.monotonic())

    def _read(self) -> None:
        self._read_states()
        if self.store.check(["end"]):
            self._ended(json.loads(self.store.get("end")))
        self._find_dead()
        self._find_late()

    def _ended(self, end: dict[str, Any]) -> None:
        """Another rank has said that all must end."""
        if end["rank"] == self.rank:
            return
        self.told = True
        self._write(closed=self.closing.is_set())
        if self.rank in end["stalled"]:
            now = self.dog.now
            line = overdue(now, now.seconds()) if now else end["line"]
            self.dog.end(EXIT_STATUS, line)
        self._fail(f"rank {end['rank']} has ended: {end['line']}", end["status"])

    def _find_dead(self) -> None:
        """Ranks of this machine that are gone without a word."""
        import psutil

        dead = set()
        for other, state in self.states.items():
            if other == self.rank or state["closed"] or state["machine"] != self.machine:
                continue
            try:
                gone = psutil.Process(state["pid"]).status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                gone = True
            if gone:
                dead.add(other)
        # Twice in a row: its last words may have come after they were looked for.
        for other in sorted(dead & self.suspects):
            state = self.states[other]
            self._fail(
                f"rank {other} ({_words(state)}) is dead and left no reason; where the system "
                "killed it for want of memory, its log says so (dmesg)"
            )
        self.suspects = dead

    def _find_late(self) -> None:
        """Ranks whose own watchdog has not ended them."""
        for other, (_, since) in self.seen.items():
            state, seconds = self.states[other], time.monotonic() - since
            if state["limit"] and not state["closed"] and seconds > state["limit"] + LATE:
                late = Phase(state["phase"], state["step"], state["limit"])
                line = overdue(late, seconds, host=state["host"], pid=state["pid"])
                self._fail(f"rank {other}: {line}", EXIT_STATUS)

    def _fail(self, line: str, status: int = 1) -> None:
        """End this rank, unless its main thread does so first."""
        self.failure = line
        self.failed.set()
        until = time.monotonic() + GRACE
        while time.monotonic() < until:
            if self.closing.is_set():
                return
            time.sleep(0.1)
        if not self.dog.failing:
            now = self.dog.now
            place = f", in {now.place}" if now else ""
            self.dog.end(status, f"{line}; this rank ends too{place}", stacks=False)


def connect(dog: Watchdog, rank: int, world: int) -> None:
    """Share phases over a connection of its own to the process group's store."""
    import torch.distributed as dist

    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
        )
    except (RuntimeError, KeyError) as error:
        print(
            f"watchdog  ranks do not see one another's phases ({_first_line(error)})",
            file=sys.stderr,
        )
        return
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dog.connect(Peers(dist.PrefixStore(f"watchdog/{attempt}", store), rank, world))


def _machine() -> str:
    """What has the same process ids: the host's name, and the container's number."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _words(state: dict[str, Any]) -> str:
    """As `process 17 on node3, step 3: rollout`."""
    place = Phase(state["phase"] or "no phase", state["step"], 0).place
    return f"process {state['pid']} on {state['host']}, {place}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _quietly(function):
    """A call whose store may be gone."""

    def call() -> None:
        try:
            function()
        except RuntimeError:
            return

    return call
