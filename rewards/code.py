"""Does the program in a completion pass the tests of its row? It runs in a sandbox.

The program is the last closed block of code of the completion; without any, the whole text. The
tests are the row's answer, Python that raises where the program is wrong, as `assert f(2) == 4`
does. Several answers are joined: all tests must pass. Both run in one process, the tests in the
program's names, with Python's standard library.

`rewards/sandbox.py` has what it is kept from; docs/rewards.md says what it is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recipes.errors import ConfigError, TrainingError

SANDBOX = Path(__file__).with_name("sandbox.py")
_BLOCK = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^[ \t]*```", re.M | re.S | re.I)
# Seconds that a sandbox may need beside the program.
START = 10.0
# Characters. A longer program fails.
LONGEST = 100_000


class Code:
    """The verifier `code`, of a batch.

    Args:
        rewards: the config's section `reward`.

    Raises:
        ConfigError: it is not enabled, or programs cannot be isolated here.
    """

    # Every test of a row must pass (rewards/calls.py).
    joins_answers = True

    def __init__(self, rewards: Any):
        self.options = options = rewards.code
        if not options.enabled:
            raise ConfigError(
                "the verifier code runs programs that the model writes on this machine; allow it "
                "with reward.code.enabled=true"
            )
        # Where each sandbox mounts a root that no other process sees.
        self.root = tempfile.TemporaryDirectory(prefix="onstream_code_")
        passed, reason = self._run("import json, math, re, collections", "assert True", START)
        if passed:
            return
        hint = (
            "; reward.code.isolated=false runs them without isolation" if options.isolated else ""
        )
        raise ConfigError(
            f"reward.code cannot run programs here: {reason or 'Python does not start there'}{hint}"
        )

    def __call__(
        self, completions: Sequence[str], answers: Sequence[str | None], seconds: float
    ) -> list[float | None]:
        """1.0 for each program that passes its tests, else 0.0; None where the time was over.

        Args:
            completions: texts.
            answers: the tests of each.
            seconds: for all together.

        Raises:
            TrainingError: a sandbox did not start.
        """
        deadline = time.monotonic() + seconds

        def grade(pair: tuple[str, str | None]) -> float | None:
            limit = min(self.options.seconds, deadline - time.monotonic())
            return self._grade(program_of(pair[0]), pair[1] or "", limit) if limit > 0 else None

        with ThreadPoolExecutor(self.options.parallel) as pool:
            return list(pool.map(grade, zip(completions, answers)))

    def _grade(self, program: str, tests: str, limit: float) -> float | None:
        if not program.strip() or len(program) > LONGEST:
            return 0.0
        started = time.monotonic()
        passed, reason = self._run(program, tests, limit)
        if reason:
            # The machine may have been short of something for a moment.
            passed, reason = self._run(program, tests, limit)
        if reason:
            raise TrainingError(f"reward.code: a sandbox did not start: {reason}")
        if not passed and limit < self.options.seconds and time.monotonic() - started >= limit:
            return None
        return float(passed)

    def _run(self, program: str, tests: str, seconds: float) -> tuple[bool, str]:
        """Whether a program passes tests, and why none can run."""
        options, token = self.options, secrets.token_hex(16)
        task = {
            "program": program,
            "tests": tests,
            "token": token,
            "isolated": options.isolated,
            "root": self.root.name,
            "seconds": seconds,
            "memory": int(options.memory_gib * 2**30),
            "disk": options.disk_mib << 20,
            "processes": options.processes,
        }
        with tempfile.TemporaryDirectory(prefix="onstream_code_") as folder:
            output = _output(json.dumps(task).encode(), folder, seconds + START)
        if output.startswith(b"refused"):
            return False, output.decode(errors="replace").partition("\n")[2].strip()
        if not output.startswith(b"ready\n"):
            return False, "the sandbox ended early"
        return output == f"ready\n{token}".encode(), ""


def program_of(completion: str) -> str:
    """The last closed block of code; without one, the whole text."""
    blocks = _BLOCK.findall(completion)
    return blocks[-1] if blocks else completion


def _output(task: bytes, folder: str, seconds: float) -> bytes:
    """What a sandbox writes to its stdout, of a kibibyte at most."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", SANDBOX],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(task)
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    finally:
        # Without isolation, what the program started may still be there.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    os.set_blocking(process.stdout.fileno(), False)
    with process.stdout:
        return process.stdout.read(1024) or b""
