"""What a resumed run keeps of its records."""

import json
import resource
from types import SimpleNamespace

import numpy as np
import pytest

from recipes.compose import compose
from recipes.errors import CheckpointError, ConfigError
from rollouts.trajectory import Trajectory
from trainers.core import lock
from trainers.core.rundir import config_at, recorded
from trainers.core.tracking import Tracker, keep_through, write_config


def tracker(run, start=0):
    return Tracker(compose(["log.wandb=disabled"]), run, start, lambda scores: "")


def test_a_run_directory_that_cannot_be_written_to_is_one_line(tmp_path):
    """It was a traceback."""
    (tmp_path / "file").touch()
    run = tmp_path / "file" / "run"
    with pytest.raises(ConfigError, match=f"run.dir={run} cannot be written to .*Not a directory"):
        tracker(run)
    assert "cannot be written to" in lock.acquire(run)[1]


@pytest.mark.parametrize("points", [[], [2, 4]])
def test_records_on_a_full_disk_are_one_line_with_the_last_checkpoint(
    tmp_path, small_files, points
):
    """It was a traceback, in the midst of a run."""
    for step in points:
        (tmp_path / f"checkpoints/step_{step}").mkdir(parents=True)
    records = tracker(tmp_path, start=4)
    with pytest.raises(CheckpointError) as caught:
        records.step({"step": 5, "time/step": 1, "train/loss": [0.5] * 100_000})
    message = str(caught.value)
    assert f"{tmp_path}/metrics.jsonl could not be written (" in message and "\n" not in message
    last = f"the last checkpoint is {tmp_path}/checkpoints/step_4" if points else "no checkpoint"
    assert f"{last}; make room, and continue with resume=auto" in message


def test_an_evaluation_that_a_kill_cut_off_is_missed(tmp_path):
    """A resumed run lacked it: the step is saved before it is evaluated."""
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": 1}, {"step": 2}, {"step": 2, "eval/stories/avg@1": 1.0}, {"step": 3}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "ev')
    assert tracker(tmp_path, start=3).lacks_evaluation(due=True)
    assert not tracker(tmp_path, start=3).lacks_evaluation(due=False)
    assert not tracker(tmp_path, start=2).lacks_evaluation(due=True)
    # The records of a new run that starts from a checkpoint begin after it.
    assert not tracker(tmp_path / "new", start=2).lacks_evaluation(due=True)


def test_the_last_value_of_a_metric_is_found(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "speed": 1}\n{"step": 1, "speed": 2}\n{"step": 2}\n{"st')
    assert recorded(tmp_path, "speed") == 2 and recorded(tmp_path, "other") is None
    assert recorded(tmp_path / "none", "speed") is None


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\x0b", "\x1c"])
def test_records_with_unusual_line_ends_are_kept(tmp_path, mark):
    path = tmp_path / "completions.jsonl"
    rows = [{"step": step, "completion": f"one{mark}two"} for step in (1, 2, 3, 4)]
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    keep_through(path, 3)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == rows[
        :3
    ]


def test_a_line_that_was_cut_off_goes_and_what_comes_after_it_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "los\n{"step": 2}\n{"step": 3')
    keep_through(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_config_of_earlier_steps_stays(tmp_path):
    """It was overwritten: what the steps before a resume were trained with was gone."""
    write_config(tmp_path, "first", 0)
    write_config(tmp_path, "first again", 0)  # died before its first checkpoint
    write_config(tmp_path, "second", 4)
    write_config(tmp_path, "second again", 4)  # and so did this one, of step 5
    write_config(tmp_path, "third", 8)
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts == {
        "config.4.yaml": "first again",
        "config.8.yaml": "second again",
        "config.yaml": "third",
    }
    assert [config_at(tmp_path, step).read_text() for step in (1, 4, 5, 8, 9)] == [
        "first again",
        "first again",
        "second again",
        "second again",
        "third",
    ]
    # A run that goes back to step 2, which the first one trained.
    write_config(tmp_path, "fourth", 2)
    assert config_at(tmp_path, 2).read_text() == "first again"
    assert config_at(tmp_path, 3).read_text() == "fourth"


def test_a_config_is_whole_or_the_one_before(tmp_path):
    """It was opened for writing first, so that a full disk left an empty one."""
    write_config(tmp_path, "first", 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError):
            write_config(tmp_path, "x" * 10_000, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "config.yaml").read_text() == "first"


def test_a_reward_that_is_not_finite_is_null(tmp_path):
    """NaN and Infinity are no JSON."""
    tracker = object.__new__(Tracker)
    tracker.active = True
    trajectory = Trajectory(0, 0, [1], [2, 3], "stop", reward=float("inf"))
    trajectory.annotations["rewards"] = np.array([np.nan, 0.5], np.float32)
    with (tmp_path / "completions.jsonl").open("w", encoding="utf-8") as tracker.completions_file:
        tracker.completions(1, [trajectory], SimpleNamespace(decode=lambda ids: "x"))
    text = (tmp_path / "completions.jsonl").read_text(encoding="utf-8")
    row = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert row["reward"] is None and row["token_rewards"] == [None, 0.5]
