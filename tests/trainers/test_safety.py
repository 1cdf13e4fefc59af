"""A run never trains on with wrong weights, and loses none that it has trained."""

import json
from pathlib import Path

import pytest

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
