"""The process in which answers are parsed and compared, with limits of time and memory.

A time limit in the trainer's own process would be a signal, which works in the main thread only and
takes over the process's alarm. A signal cannot interrupt Python's C code, which `\\binom{10^9}
{10^8}` keeps busy for hours. A process that the kernel ends is safe from any thread.

The process loads math-verify once, and forks a child that answers questions. The alarm ends the
child, and the next fork takes milliseconds. So a question that takes too long costs little more
than its limit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes.errors import OnstreamError

# Bytes of address space that the process may use.
MEMORY = 4 << 30
# The line that stands for a question which took too long; no JSON.
TOO_SLOW = "too slow"
# Questions that load what the parser loads at its first use, so that every child has it.
FIRST = ((r"\frac{x}{2}", "0.5x"), ("x>2", r"(2,\infty)"), (r"\sqrt{2}, 1", r"\{1, 2^{1/2}\}"))


class MathProcess:
    """One process of math-verify. It starts when first needed, and again after it died."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: subprocess.Popen[str] | None = None

    def ask(self, seconds: float, *question: str) -> Any:
        """The process's answer to (kind, text, …); None where it failed or died on the question.

        Args:
            seconds: the limit, of this machine's clock.

        Raises:
            TimeoutError: it took longer.
            OnstreamError: math-verify does not start.
        """
        with self.lock:
            # The process goes back after a whole exchange only. An interrupt in between must not
            # leave an answer behind for the next question.
            process, self.running = self.running, None
            # In a forked child, poll() says that the process is gone. The child must not share its
            # parent's pipes.
            if process is None or process.poll() is not None:
                process = _start()
            answer = _exchange(process, json.dumps([seconds, *question]))
            if not answer:
                process.kill()
                process.communicate()
                return None
            self.running = process
            if answer == TOO_SLOW:
                raise TimeoutError(f"not answered in {seconds} seconds")
            return json.loads(answer)


def _start() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "rewards.math_process"],
        cwd=Path(__file__).resolve().parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        reason = process.communicate()[1].strip().rpartition("\n")[2]
        raise OnstreamError(
            f"reward.verifier=math cannot start math-verify: {reason}; run scripts/setup.sh"
        )
    return process


def _exchange(process: subprocess.Popen[str], question: str) -> str:
    """The line with which the process answers a question; empty where it died on it."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(question + "\n")
        process.stdin.flush()
        return process.stdout.readline().rstrip("\n")
    except BrokenPipeError:
        return ""


# The process's side


def _serve() -> None:
    """A question a line on stdin, an answer a line on stdout, until stdin ends."""
    import contextlib
    import logging
    import resource

    from math_verify import parse

    from rewards.equality import equal

    def find(tail: str) -> str | None:
        answers = parse(tail, parsing_timeout=None)
        return next((answer for answer in answers if isinstance(answer, str)), None)

    functions: dict[str, Callable[..., Any]] = {"find": find, "equal": equal}
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # The LaTeX parser prints its complaints. They go nowhere as long as the process lives.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    logging.disable(logging.CRITICAL)
    # macOS refuses the limit.
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # The default action ends the process, even inside C code.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    find("The answer is $5$.")
    for one, other in FIRST:
        equal(one, other)
    print("ready", file=answers, flush=True)
    while True:
        child = os.fork()
        if child == 0:
            _answer(functions, answers)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGALRM:
            # The questions are over, or the child died of its question, and so does the process.
            return
        print(TOO_SLOW, file=answers, flush=True)


def _answer(functions: dict[str, Callable[..., Any]], answers: Any) -> None:
    for line in sys.stdin:
        seconds, kind, *texts = json.loads(line)
        # Zero would be no limit.
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
        try:
            answer = functions[kind](*texts)
        except Exception:
            # Whatever a garbled answer does to the parser, it is not the right answer.
            answer = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
