"""Runs Python commands in forks of one process that has imported the libraries.

Their imports cost each command four seconds or more. A fork shares them, and is otherwise as a new
process: it has a session, environment, search path, random state and output files of its own.

The process imports and computes nothing else, so that no thread is lost in a fork. If an import has
started a thread, each command is a new process instead. So is one whose environment differs in a
variable that a library may have read on its import, and one that `forks` refuses.

Run by `Server`: a line of standard input is a command, as JSON. A line of standard output is a
fork's process id, and another its exit status."""

from __future__ import annotations

import importlib
import json
import os
import random
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ("torch", "transformers", "deepspeed", "trainers.loop", "trainers.prepare")
PRELOADED += ("trainers.opd", "rollouts.engines.huggingface")
# Read when a command starts, or while it runs, and by no import.
READ_LATER = {"PYTHONPATH", "PYTEST_CURRENT_TEST", "CXX"}


def forks(words: list[str]) -> bool:
    """Whether a command can be a fork: `-c` may look at what is imported, and vLLM has threads and
    processes of its own."""
    samples = words[0] == "train.py" and not {"rollout.engine=hf", "dry_run=true"} & set(words)
    return words[0] != "-c" and not samples


class Server:
    """The test's end.

    Args:
        environment: the variables that the libraries are imported with.
    """

    def __init__(self, environment: dict[str, str]):
        self.environment = self._compared(environment)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env={name: environment[name] for name in environment if name != "PYTHONPATH"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        # Whether its forks are whole.
        self.works = self._line(timeout=300) == 1

    def takes(self, words: list[str], environment: dict[str, str]) -> bool:
        """Whether a command would be the same as a new process."""
        return self.works and forks(words) and self._compared(environment) == self.environment

    def run(
        self, words: list[str], environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess:
        """As subprocess.run of `python WORDS …`, with captured output.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder, name)) for name in ("out", "err")]
            self.process.stdin.write(json.dumps([words, environment, *files]).encode() + b"\n")
            self.process.stdin.flush()
            child = self._line(timeout)
            try:
                status = self._line(timeout)
            except subprocess.TimeoutExpired:
                os.kill(child, signal.SIGKILL)
                self._line(60)
                raise
            out, err = (Path(file).read_text("utf-8") for file in files)
        return subprocess.CompletedProcess(words, status, out, err)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def _line(self, timeout: float) -> int:
        # Never two lines at once: the second comes when the fork has ended.
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        if not ready:
            raise subprocess.TimeoutExpired(self.process.args, timeout)
        digits = b""
        while not digits.endswith(b"\n"):
            byte = os.read(self.process.stdout.fileno(), 1)
            if not byte:
                raise RuntimeError("the command server has ended")
            digits += byte
        return int(digits)

    @staticmethod
    def _compared(environment: dict[str, str]) -> dict[str, str]:
        return {name: environment[name] for name in environment if name not in READ_LATER}


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what the libraries remark is no answer
    sys.path[0] = str(ROOT)
    from scripts.cli import quiet_libraries

    before = dict(os.environ)
    quiet_libraries()
    for name in PRELOADED:
        importlib.import_module(name)
    os.environ.clear()
    os.environ.update(before)
    del sys.path[0]
    say(answers, len(os.listdir("/proc/self/task")))
    for line in sys.stdin:
        words, environment, out, err = json.loads(line)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            become_new(environment, out, err)
            run(words)
            return  # and so the interpreter ends as that of a new process does
        say(answers, child)
        say(answers, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def say(answers: int, number: int) -> None:
    os.write(answers, f"{number}\n".encode())


def become_new(environment: dict[str, str], out: str, err: str) -> None:
    """What a new process has of its own."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = paths
    random.seed()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    opened = [os.open(os.devnull, os.O_RDONLY), os.open(out, flags), os.open(err, flags)]
    for target, stream in enumerate(opened):
        os.dup2(stream, target)
    os.closerange(3, 256)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115


def run(words: list[str]) -> None:
    """`python WORDS …`: a file, or `-m` and a module."""
    if words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
