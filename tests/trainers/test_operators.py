"""Operators compiled on first use: locks of killed processes are removed, living ones are waited
for, in words."""

import os
import subprocess
import sys
import time

import pytest

from trainers.core import operators

HOLDER = """
import os, sys, time
os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "some_op").mkdir()
    return tmp_path / "some_op"


def hold(lock):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_lock_of_a_killed_process_is_removed(folder):
    process = hold(folder / "lock")
    process.kill()
    process.wait()
    assert (folder / "lock").exists()
    said, started = [], time.monotonic()
    assert operators.compile_once("some_op", lambda: "loaded", said.append) == "loaded"
    assert time.monotonic() - started < 10
    assert not (folder / "lock").exists()
    assert any("left" in line and str(folder / "lock") in line for line in said)
    assert any(line.startswith("compiling DeepSpeed's some_op, once") for line in said)


def test_a_living_process_is_waited_for(folder):
    process = hold(folder / "lock")
    said = []

    def say(line):
        said.append(line)
        process.kill()  # it is said while it is waited for, not after

    assert operators.compile_once("some_op", lambda: "loaded", say) == "loaded"
    process.wait()
    assert said[0] == "waiting for another process that compiles some_op"


def test_an_operator_that_is_there_is_not_announced(folder):
    (folder / "some_op.so").touch()
    said = []
    operators.compile_once("some_op", lambda: None, said.append)
    assert said == []


def test_an_old_lock_of_somebody_whose_processes_cannot_be_seen_is_abandoned(folder, monkeypatch):
    monkeypatch.setattr(operators, "processes_that_hold", lambda file: ([], True))
    lock = folder / "lock"
    lock.touch()
    assert not operators.is_free(lock, print)
    os.utime(lock, (0, 0))
    assert operators.is_free(lock, print) and not lock.exists()


def test_a_run_compiles_nothing(overrides, run_command, tmp_path, monkeypatch):
    """Nor would it find a compiler. Stale locks of what DeepSpeed would compile do not matter:
    nobody asks for it."""
    for name in ("deepspeed_shm_comm", "shm_comm", "cpu_adam"):
        (tmp_path / "extensions" / name).mkdir(parents=True)
        (tmp_path / "extensions" / name / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("CXX", "/bin/false")
    done = run_command("train.py", *overrides(train__steps=1, rollout__engine="vllm"), timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    built = [
        path for folder in ("extensions", "inductor") for path in (tmp_path / folder).rglob("*.*")
    ]
    assert built == []


def test_offloading_without_a_compiler_is_one_line(overrides, run_command, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    done = run_command("train.py", *overrides(), "engine=zero2_offload", timeout=60)
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("error: engine.offload_optimizer=true compiles DeepSpeed's")
    )
