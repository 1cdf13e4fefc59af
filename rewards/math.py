"""Is a completion's final answer correct? The last boxed answer, compared by the math-verify
library.

The library runs in a process of its own. Its own time limit is a signal: that works in the main
thread only, takes over the process's alarm, and cannot interrupt Python's C code, which
`9^{9^{9^9}}` keeps busy for hours. A process that the kernel ends is safe from any thread. Plain
integers and equal strings never get there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes.errors import OnstreamError

TIMEOUT = 5  # seconds for one comparison; over it counts as wrong
MEMORY = 4 << 30  # bytes of address space the process may use
LONGEST = 1000  # characters; a longer answer is wrong unless the strings are equal
TAIL = 400  # characters at the end of a completion without a box in which an answer is looked for

BOX = r"\\f?box(?:ed)?\s*\{"
_BOX = re.compile(BOX)
_BRACES = re.compile(BOX + r"|\\.|[{}]", re.DOTALL)  # an escaped brace is not a brace
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
        tail = tail.partition(" ")[2]  # the first word may be the end of a longer number
    return _found(tail) if re.search(r"[\d$\\]", tail) else None


def extract_boxed(text: str) -> str | None:
    """The stripped content of the last closed `\\boxed{…}`, also `\\fbox` and `\\box`; None without
    one."""
    open_braces: list[int | None] = []  # for a box, where its content starts
    last = None
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]):
                last = start, token.start()
        elif token[0].endswith("{") and token[0] != "\\{":
            open_braces.append(None if token[0] == "{" else token.end())
    return text[slice(*last)].strip() if last else None


def _plain(text: str) -> str:
    text = text.replace("\\$", "").replace("$", "").strip().removesuffix(".")
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
    """One math-verify process, started when first needed and again after it died on a question."""

    def __init__(self):
        self.lock = threading.Lock()
        self.running: subprocess.Popen | None = None

    def ask(self, *question: str) -> Any:
        """The answer, or None where the process failed or died on it."""
        with self.lock:
            # Put back after a whole exchange only: an interrupt in between must not leave an answer
            # behind for the next question.
            process, self.running = self.running, None
            # poll() also says that it is gone in a forked child, which must not share its parent's
            # pipes.
            if process is None or process.poll() is not None:
                process = self._start()
            try:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                process.kill()
                process.communicate()
                return None
            self.running = process
            return json.loads(answer)

    @staticmethod
    def _start() -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "rewards.math", str(TIMEOUT)],
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if process.stdout.readline() != "ready\n":
            reason = process.communicate()[1].strip().rpartition("\n")[2]
            raise OnstreamError(
                f"reward.verifier=math cannot start math-verify: {reason}; run scripts/setup.sh"
            )
        return process


_process = _Process()


def _serve(timeout: float) -> None:
    import contextlib
    import logging
    import resource
    import signal

    from math_verify import parse, verify

    def find(tail: str) -> str | None:
        return next(
            (found for found in parse(tail, parsing_timeout=None) if isinstance(found, str)), None
        )

    def equal(prediction: str, answer: str) -> bool:
        prediction, answer = (
            parse(f"${text}$", parsing_timeout=None) for text in (prediction, answer)
        )
        return verify(answer, prediction, timeout_seconds=None)

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # the LaTeX parser prints its complaints
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ValueError):  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # the default action ends the process, even inside C code
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        kind, *texts = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            answer = {"find": find, "equal": equal}[kind](*texts)
        # whatever a garbled answer does to the parser, it is not the right answer
        except Exception:
            answer = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
