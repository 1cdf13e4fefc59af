"""Runs Python commands in forks of one process that has imported the libraries.

Their imports cost each command four seconds or more. A fork shares them, and is otherwise as a new
process: it has a session, environment, search path, random state and output files of its own.

The process imports and computes nothing else, so that no thread is lost in a fork. If an import has
started a thread, each command is a new process instead. So is one whose environment differs in a
variable that a library may have read on its import, and one that `forks` refuses.

Run by `Server`: a line of standard input is a command, as JSON, with the environment of each of its
ranks. Lines of standard output are the forks' process ids, and then their exit statuses, each in
the order of the ranks."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# With what a run imports as it starts.
PRELOADED = (
    *("torch", "transformers", "deepspeed", "accelerate", "hydra", "yaml", "peft"),
    *("trainers.loop", "trainers.prepare", "trainers.opd", "trainers.core.tracking"),
    *("rollouts.engines.huggingface", "rollouts.engines.cache", "scripts.report"),
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.qwen3.modeling_qwen3", "transformers.generation.utils"),
    *("deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2"),
    *("deepspeed.runtime.bf16_optimizer", "deepspeed.module_inject.auto_ep_layer"),
    # It imports torch._dynamo, half of what a run imports.
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
# Read when a command starts, or while it runs, and by no import.
READ_LATER = {"PYTHONPATH", "PYTEST_CURRENT_TEST", "CXX", "TORCH_DONT_CHECK_COMPILER_ABI"}
READ_LATER |= {"TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CPU_OMP_THREADS_BIND"}
# Of the runs that sample without vLLM: what they are told, and what their recipes begin with.
WITHOUT_VLLM = {"rollout.engine=hf", "dry_run=true"}
READERS = ("recipe=adasr", "recipe=streaming_sft", "recipe=proactivellm")
# Seconds that the other ranks have to end by themselves when one has failed.
GRACE = 20.0


def forks(words: list[str]) -> bool:
    """Whether a command can be a fork: `-c` may look at what is imported."""
    return words[0] != "-c"


def samples_with_vllm(words: list[str]) -> bool:
    """Whether a command imports vLLM. The recipes that read bit by bit have other engines."""
    own = any(word.startswith(READERS) for word in words)
    trains = words[0] == "train.py" and not own and not WITHOUT_VLLM & set(words)
    return trains or "tests.trainers.lora_worker" in words


def rank_variables(ranks: int) -> list[dict[str, str]]:
    """What tells each of so many ranks who it is; of 0 ranks: one process that is told nothing."""
    if not ranks:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


class Server:
    """The test's end.

    Args:
        environment: the variables that the libraries are imported with.
        vllm: whether vLLM is imported too.
    """

    def __init__(self, environment: dict[str, str], vllm: bool = False):
        self.environment = self._compared(environment)
        self.process = subprocess.Popen(
            [sys.executable, __file__, *(["vllm"] if vllm else [])],
            cwd=ROOT,
            env={name: environment[name] for name in environment if name != "PYTHONPATH"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        # One command at a time, whichever thread it comes from.
        self.turn = threading.Lock()
        # Whether its forks are whole.
        self.works = self._line(timeout=300) == 1

    def takes(self, words: list[str], environment: dict[str, str]) -> bool:
        """Whether a command would be the same as a new process."""
        return self.works and forks(words) and self._compared(environment) == self.environment

    def run(
        self, words: list[str], environment: dict[str, str], timeout: float, ranks: int = 0
    ) -> subprocess.CompletedProcess:
        """As subprocess.run of `python WORDS …`, with captured output.

        Args:
            ranks: so many processes, each with the variables of its rank; 0: one without any.

        Returns:
            the process; of several ranks, with the status of the first that has failed.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
        """
        with self.start(words, environment, ranks) as started:
            return started.wait(timeout)

    @contextlib.contextmanager
    def start(self, words: list[str], environment: dict[str, str], ranks: int = 0):
        """A command that has started, as a `Started`. It is killed where it has not ended after."""
        environments = [environment | variables for variables in rank_variables(ranks)]
        with self.turn, tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder, name)) for name in ("out", "err")]
            for file in files:
                Path(file).touch()
            line = json.dumps([words, environments, *files])
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
            started = Started(self, words, [self._line(60) for _ in environments], files)
            try:
                yield started
            finally:
                started.kill()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def _line(self, timeout: float) -> int:
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


class Started:
    """A command that runs.

    Attributes:
        pids: its processes, in the order of the ranks.
        statuses: their exit statuses, once they have ended.
    """

    def __init__(self, server: Server, words: list[str], pids: list[int], files: list[str]):
        self.server, self.words, self.pids = server, words, pids
        self.out, self.err = map(Path, files)
        self.statuses: list[int] = []

    def wait(self, timeout: float) -> subprocess.CompletedProcess:
        """Its end, as that of subprocess.run.

        Raises:
            subprocess.TimeoutExpired: it took longer; it is killed.
        """
        end = time.monotonic() + timeout
        while len(self.statuses) < len(self.pids):
            self.statuses.append(self.server._line(max(0.0, end - time.monotonic())))
        out, err = (file.read_text("utf-8") for file in (self.out, self.err))
        status = next(filter(None, self.statuses), 0)
        return subprocess.CompletedProcess(self.words, status, out, err)

    def kill(self) -> None:
        """Kill what has not ended, and see its end."""
        if len(self.statuses) < len(self.pids):
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.wait(60)


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what the libraries remark is no answer
    sys.path[0] = str(ROOT)
    from scripts.cli import quiet_libraries

    before = dict(os.environ)
    quiet_libraries()
    for name in PRELOADED:
        importlib.import_module(name)
    whole = "vllm" not in sys.argv or import_vllm()
    os.environ.clear()
    os.environ.update(before)
    del sys.path[0]
    # A fork need not go through what is here already when it looks for garbage.
    gc.collect()
    gc.freeze()
    say(answers, len(os.listdir("/proc/self/task")) if whole else 0)
    for line in sys.stdin:
        words, environments, *files = json.loads(line)
        sys.stdout.flush()
        children = []
        for environment in environments:
            child = os.fork()
            if not child:
                become_new(environment, *files)
                run(words)
                return  # and so the interpreter ends as that of a new process does
            children.append(child)
            say(answers, child)
        statuses = ends(children)
        for child in children:
            say(answers, statuses[child])


def import_vllm() -> bool:
    """As the engine imports it; whether a fork can use it, which a GPU does not allow."""
    from rollouts.engines.vllm import interpret_small_functions, prepare_import

    prepare_import(True, 1)
    try:
        interpret_small_functions()
        from vllm.platforms import current_platform

        for name in ("vllm", "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"):
            importlib.import_module(name)
    except ImportError:
        return False
    return current_platform.is_cpu()


def say(answers: int, number: int) -> None:
    os.write(answers, f"{number}\n".encode())


def ends(children: list[int]) -> dict[int, int]:
    """The exit statuses of processes. After one fails, the others have `GRACE` to end."""
    statuses: dict[int, int] = {}
    limit = None
    while len(statuses) < len(children):
        child, status = os.waitpid(-1, 0 if limit is None else os.WNOHANG)
        if child:
            statuses[child] = os.waitstatus_to_exitcode(status)
            if statuses[child] and limit is None:
                limit = time.monotonic() + GRACE
            continue
        if time.monotonic() > limit:
            for other in set(children) - statuses.keys():
                os.kill(other, signal.SIGKILL)
        time.sleep(0.02)
    return statuses


def become_new(environment: dict[str, str], out: str, err: str) -> None:
    """What a new process has of its own."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = paths
    random.seed()
    flags = os.O_WRONLY | os.O_APPEND  # ranks share the files
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
