"""What a rank says whose Python hangs: it is printed by a small process beside the rank.

C code that keeps the interpreter's lock lets no thread of Python run, so none can print why the
rank ends. `faulthandler` needs no lock: it writes the stacks into a pipe, and ends the rank. This
file is run at the other end of the pipe. It prints the stacks, ends the rank's children, and then
prints the line that the rank wrote when it entered the phase.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import TextIO

# Seconds between two looks at the rank.
EVERY = 0.5
# Seconds that a rank gives this process to end.
PATIENCE = 2.0


class LastWords:
    """The rank's end of the pipe. The rank goes on without it if the other process is gone."""

    def __init__(self):
        self.process = subprocess.Popen(
            # Isolated: a file of the working directory shadows no module.
            [sys.executable, "-I", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        assert self.process.stdin is not None
        self.pipe = self.process.stdin
        # A process that is stopped must not stop the rank.
        os.set_blocking(self.pipe.fileno(), False)

    @property
    def stacks(self) -> TextIO:
        """Where `faulthandler` writes."""
        return sys.__stderr__ if self.process.poll() is not None else self.pipe  # type: ignore

    def leave(self, line: str, seconds: float) -> None:
        """Say `line` if this rank's stacks come. From `seconds` on, its children are noted.

        Args:
            line: the reason for the end.
            seconds: from now.
        """
        record = json.dumps({"line": line, "at": monotonic() + seconds}) + "\n"
        with contextlib.suppress(OSError):
            os.write(self.pipe.fileno(), record.encode())

    def close(self) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self.pipe.close()
            self.process.wait(PATIENCE)


def listen(pipe: int, parent: int) -> None:
    """Read a rank's records until it ends; print its stacks and its last line if they come.

    Args:
        pipe: the file descriptor that the rank writes into.
        parent: the rank's process.
    """
    import psutil

    rank = psutil.Process(parent)
    record, stacks, rest, children = {"line": "", "at": float("inf")}, [], b"", []
    while True:
        ready, _, _ = select.select([pipe], [], [], EVERY)
        if ready:
            chunk = os.read(pipe, 65536)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"{"):
                    record = json.loads(line)
                else:
                    stacks.append(line)
        elif os.getppid() != parent:
            # A child that the rank has forked still holds the pipe open.
            break
        if not stacks and monotonic() > record["at"]:
            with contextlib.suppress(psutil.Error):
                children = rank.children(recursive=True)
    if stacks:
        end(children, b"\n".join(stacks).decode(), record["line"])


def end(children, stacks: str, line: str) -> None:
    """Print the stacks and the line, and kill the `children`, but this process."""
    import psutil

    print(stacks, file=sys.stderr)
    for child in children:
        if child.pid != os.getpid():
            with contextlib.suppress(psutil.Error):
                child.kill()
    print(f"error: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # Ctrl-C goes to this process too. It ends with the rank.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    listen(sys.stdin.fileno(), os.getppid())
