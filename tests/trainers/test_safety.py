"""A run never trains on with wrong weights, and loses none that it has trained."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from recipes.compose import compose
from recipes.errors import ConfigError
from trainers.core import lock
from trainers.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).parent / "nonfinite_worker.py"

VERIFIER = """
calls = 0

def broken(completion, answer):
    global calls
    calls += 1
    if calls > 8:
        raise RuntimeError("no verifier any more")
    return 0.0
"""


@pytest.fixture
def plug(tmp_path, monkeypatch):
    """Write a module that a run can import."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)

    return write


def rows(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def test_an_evaluation_that_fails_at_the_end_loses_nothing(plug, overrides, run_command, tmp_path):
    """The last step evaluated before it saved."""
    plug("plug", VERIFIER)
    keys = {"recipe": "sft", "rollout__engine": "hf", "reward__verifier": "plug.broken"}
    done = run_command("train.py", *overrides(**keys))
    assert "no verifier any more" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_2" / "manifest.json").is_file()


STAGES = [f"zero{stage}" for stage in range(4)] + [f"zero{stage}/bfloat16" for stage in (1, 2, 3)]


@pytest.mark.parametrize("ranks", [0, 2])
def test_an_update_that_is_not_finite_leaves_every_weight(
    ranks, tiny_models, run_command, monkeypatch
):
    """Under zero0 it made all weights NaN."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = run_command(WORKER, tiny_models["student"], *STAGES, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = [json.loads(line) for line in lines]
    assert [row["stage"] for row in found] == STAGES
    for row in found:
        assert row["moved"] == [True, False, False, True], row
        assert [math.isfinite(norm) for norm in row["norms"]] == row["moved"], row


NAN_REWARD = """
import math
import signal
import subprocess
import sys

class Once:
    # The second and the third update are not finite.
    window, fused, calls = False, None, 0

    def __init__(self, config):
        pass

    def __call__(self, teacher, student):
        Once.calls += 1
        reward = teacher.exp() - student.exp()
        return reward * math.nan if Once.calls in (2, 3) else reward
"""


@pytest.mark.parametrize("stage, limit", [("zero0", 2), ("zero1", 3)])
def test_updates_that_are_not_finite_are_counted_and_stop_the_run(
    stage, limit, plug, overrides, run_command, tmp_path
):
    plug("plug", NAN_REWARD)
    keys = {"reward__token": "plug.Once", "rollout__engine": "hf", "engine": stage}
    keys |= {"train__steps": 5, "eval__every": -1, "train__max_nonfinite": limit}
    done = run_command("train.py", *overrides(**keys))
    counts = [row["train/nonfinite"] for row in rows(tmp_path / "run")]
    if limit == 3:
        assert done.returncode == 0, done.stderr[-2000:]
        assert counts == [0, 1, 1, 0, 0]
        model = load_file(tmp_path / "run/checkpoints/step_5/model/model.safetensors")
        assert all(tensor.isfinite().all() for tensor in model.values())
        return
    assert done.returncode == 1 and counts == [0, 1]
    assert done.stderr.splitlines() == [
        "error: step 3: the loss or gradient of 2 updates in a row was not finite "
        "(train.max_nonfinite); lower train.lr, look for NaN in the rewards, or resume from a "
        "checkpoint"
    ]


@pytest.mark.parametrize("recipe", ["sft", "poweropd"])
def test_a_run_that_diverges_ends_in_one_line(recipe, overrides, run_command, tmp_path):
    keys = {"recipe": recipe, "rollout__engine": "hf", "train__lr": 1e30, "train__steps": 6}
    keys |= {"train__schedule": "constant", "train__warmup_steps": 0, "eval__every": -1}
    done = run_command("train.py", *overrides(**keys))
    assert done.returncode == 1, done.stdout[-2000:]
    (line,) = done.stderr.splitlines()
    assert "updates in a row was not finite" in line


def test_weights_that_are_not_finite_are_not_saved(overrides, run_command, tmp_path):
    keys = {"recipe": "sft", "rollout__engine": "hf", "train__lr": 1e30, "train__steps": 1}
    keys |= {"train__weight_decay": 1e30, "train__warmup_steps": 0, "eval__every": -1}
    done = run_command("train.py", *overrides(**keys))
    assert done.returncode == 1, done.stdout[-2000:]
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: step 1: weights are NaN or infinite, so no checkpoint was saved")
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    "keys, message",
    [
        (["model.dtype=bfloat16", "engine=zero0"], "does not go with engine.zero_stage=0.*zero1"),
        (["train.minibatches=2"], "train.minibatches=2: .*no importance ratio"),
    ],
)
def test_updates_that_would_be_wrong_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(compose(["recipe=poweropd", *keys]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
def test_a_resumed_run_has_the_optimizers_options_of_its_command(
    stage, overrides, run_command, tmp_path
):
    """DeepSpeed restored those of the first command: the weights would have stayed."""
    keys = {"recipe": "sft", "engine": stage, "train__lr": 5e-3, "train__schedule": "constant"}
    keys |= {"train__warmup_steps": 0, "train__steps": 1, "eval__every": -1}
    norms = []
    for more in ({}, {"resume": "auto", "train__steps": 2, "train__weight_decay": 100}):
        keys |= more
        done = run_command("train.py", *overrides(**keys))
        assert done.returncode == 0, done.stderr[-2000:]
        folder = tmp_path / f"run/checkpoints/step_{keys['train__steps']}/model"
        weights = load_file(folder / "model.safetensors").values()
        norms.append(sum(float(tensor.square().sum()) for tensor in weights) ** 0.5)
    # AdamW takes off lr times the decay: a half.
    assert norms[1] == pytest.approx(norms[0] / 2, rel=0.05)


HOLDER = """
import sys, time
from pathlib import Path
from trainers.core import lock

held = lock.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_start_into_a_run_directory_names_the_first(overrides, run_command, tmp_path):
    """It dropped the first one's records, and wrote the same checkpoints."""
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    for resume in ("null", "auto"):
        keys = {"recipe": "sft", "resume": resume, "train__steps": 1, "eval__every": -1}
        done = run_command("train.py", *overrides(**keys))
        (line,) = done.stderr.splitlines()
        assert f"run.dir={run}: process {holder.pid} on " in line and done.returncode == 1
    # A killed process has no lock any more.
    holder.kill()
    holder.wait()
    assert lock.hold(run) is not None


@pytest.mark.parametrize("number, ranks", [(signal.SIGUSR1, 1), (signal.SIGTERM, 2)])
def test_a_signal_to_a_rank_saves_a_checkpoint_at_the_next_step(
    number, ranks, overrides, start_command, tmp_path
):
    """It ended the process, and all steps were lost. Without torchrun, which would signal all."""
    keys = {"recipe": "sft", "train__steps": 100_000, "eval__every": -1, "engine": "zero1"}
    deadline = time.monotonic() + 60
    with start_command("train.py", *overrides(**keys), ranks=ranks) as started:
        while " 2/100000" not in started.out.read_text():
            assert time.monotonic() < deadline, started.err.read_text()
            time.sleep(0.02)
        os.kill(started.pids[-1], number)
        said = started.wait(60).stdout
    assert started.statuses == [143] * ranks, said
    last = rows(tmp_path / "run")[-1]["step"]
    assert f"stopped by a signal after step {last}; continue with resume=auto" in said
    folder = tmp_path / f"run/checkpoints/step_{last}"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert last < 50 and manifest["ranks"] == ranks
    assert {name for name in manifest["files"] if name.startswith("state/")} == {
        f"state/rank_{rank}_0.safetensors" for rank in range(ranks)
    }
