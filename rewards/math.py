"""Is a completion's final answer correct? math-verify compares the last boxed answer.

That library runs in a process of its own. Its time limit is a signal, which works in the main
thread only and takes over the process's alarm. The signal cannot interrupt Python's C code, which
`9^{9^{9^9}}` keeps busy for hours. A process that the kernel ends is safe from any thread. Plain
integers and equal strings never get there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes.errors import OnstreamError

# Seconds for one comparison. One that takes longer counts as wrong.
TIMEOUT = 5
# Bytes of address space that the process may use.
MEMORY = 4 << 30
# Characters. A longer answer is wrong unless the strings are equal.
LONGEST = 1000
# Characters at the end of a completion without a box, among which an answer is looked for.
TAIL = 400

BOX = r"\\f?box(?:ed)?\s*\{"
_BOX = re.compile(BOX)
# An escaped brace is not a brace.
_BRACES = re.compile(BOX + r"|\\.|[{}]", re.DOTALL)
_INTEGER = re.compile(r"[+-]?\d{1,50}")


def grade(completion: str, answer: str) -> float:
    """1.0 if the completion's final answer equals `answer`, else 0.0.

    Equality is math-verify's: 0.5 is 1/2, `1,000` is 1000, `x=5` is 5, `46\\text{ shells}` is 46.
    Dollar signs, a final full stop and a final percent sign are dropped from both sides first. No
    text makes it raise.

    Raises:
        OnstreamError: math-verify is not installed.
    """
    prediction = extract_answer(completion)
    return float(prediction is not None and _equal(_plain(prediction), _plain(answer)))


def extract_answer(completion: str) -> str | None:
    """The completion's final answer as text.

    It is the content of the last closed box. Where there is no box at all, it is what math-verify
    finds in the last 400 characters. A box that was opened but never closed is a completion cut
    short: None, as where nothing was found.

    Raises:
        OnstreamError: math-verify is not installed.
    """
    boxed = extract_boxed(completion)
    if boxed is not None or _BOX.search(completion):
        return boxed or None
    tail = completion[-TAIL:]
    if len(completion) > TAIL:
        # The first word may be the end of a longer number.
        tail = tail.partition(" ")[2]
    return _found(tail) if re.search(r"[\d$\\]", tail) else None


def extract_boxed(text: str) -> str | None:
    """The stripped content of the last closed box, None without one.

    A box is `\\boxed{…}`, `\\fbox{…}` or `\\box{…}`.
    """
    # Where the content of an open box starts; None for another brace.
    open_braces: list[int | None] = []
    last: tuple[int, int] | None = None
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]):
                last = start, token.start()
        elif token[0].endswith("{") and token[0] != "\\{":
            open_braces.append(None if token[0] == "{" else token.end())
    return text[slice(*last)].strip() if last else None


def _plain(text: str) -> str:
    """The text without dollar signs, and without a percent sign and a full stop at its end."""
    text = text.replace("\\$", "").replace("$", "")
    text = text.strip().removesuffix(".")
    return text.removesuffix("%").removesuffix("\\").strip()


@lru_cache(maxsize=1 << 16)
def _equal(prediction: str, answer: str) -> bool:
    if prediction == answer:
        return answer != ""
    if _INTEGER.fullmatch(prediction) and _INTEGER.fullmatch(answer):
        return int(prediction) == int(answer)
    if not prediction or not answer or max(len(prediction), len(answer)) > LONGEST:
        return False
    return bool(_process.ask("equal", prediction, answer))


@lru_cache(maxsize=1 << 12)
def _found(tail: str) -> str | None:
    return _process.ask("find", tail)


class _Process:
    """One math-verify process. It starts when first needed, and again after it died."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: subprocess.Popen[str] | None = None

    def ask(self, *question: str) -> Any:
        """The process's answer to (kind, text, …); None where it failed or died on the question.

        Raises:
            OnstreamError: math-verify does not start.
        """
        with self.lock:
            # The process goes back after a whole exchange only. An interrupt in between must not
            # leave an answer behind for the next question.
            process, self.running = self.running, None
            # In a forked child, poll() says that the process is gone. The child must not share its
            # parent's pipes.
            if process is None or process.poll() is not None:
                process = self._start()
            answer = _exchange(process, json.dumps(question))
            if not answer:
                process.kill()
                process.communicate()
                return None
            self.running = process
            return json.loads(answer)

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "rewards.math", str(TIMEOUT)],
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


_process = _Process()


def _exchange(process: subprocess.Popen[str], question: str) -> str:
    """The line with which the process answers a question; empty where it died on it."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(question + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""


def _serve(timeout: float) -> None:
    """The process's side: a question a line on stdin, an answer a line on stdout.

    Args:
        timeout: seconds, after which a question ends the process.
    """
    import contextlib
    import logging
    import resource
    import signal

    from math_verify import parse, verify

    def find(tail: str) -> str | None:
        answers = parse(tail, parsing_timeout=None)
        return next((answer for answer in answers if isinstance(answer, str)), None)

    def equal(*texts: str) -> bool:
        prediction, answer = (parse(f"${text}$", parsing_timeout=None) for text in texts)
        return verify(answer, prediction, timeout_seconds=None)

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
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        kind, *texts = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            answer = functions[kind](*texts)
        except Exception:
            # Whatever a garbled answer does to the parser, it is not the right answer.
            answer = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
