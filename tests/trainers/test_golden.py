"""The golden curves: the fast ones are run, and the comparison finds what it should."""

import copy
import json

import pytest
import torch

from benchmarks import golden


@pytest.fixture
def recorded() -> dict:
    return json.loads((golden.GOLDEN / "poweropd.json").read_text())


def test_every_recipe_has_a_golden_file():
    recipes = {path.stem for path in (golden.ROOT / "recipes" / "recipe").glob("*.yaml")}
    assert recipes <= golden.RUNS.keys()
    assert {path.stem for path in golden.GOLDEN.glob("*.json")} == golden.RUNS.keys() | {"machine"}


def test_one_digit_of_one_metric_is_a_difference(recorded):
    changed = copy.deepcopy(recorded)
    changed["rows"][2]["train/loss"] += 1e-9
    assert golden.differences(recorded, recorded) == []
    (line,) = golden.differences(recorded, changed)
    assert line.startswith("row 2 (step 2): train/loss ")
    assert golden.out_of_bounds(recorded, changed) == []


def test_other_weights_are_a_difference(recorded):
    lines = golden.differences(recorded, recorded | {"weights": "0"})
    assert lines == ["the final weights differ"]


@pytest.mark.parametrize("key, value", [("train/loss", 0.5), ("reward/mean", 0.9)])
def test_a_first_step_that_is_another_is_out_of_bounds(recorded, key, value):
    changed = copy.deepcopy(recorded)
    changed["rows"][1][key] = value
    assert any(key in line for line in golden.out_of_bounds(recorded, changed))


def test_a_missing_metric_is_out_of_bounds(recorded):
    changed = copy.deepcopy(recorded)
    del changed["rows"][1]["teacher/kl"]
    assert "teacher/kl" in golden.out_of_bounds(recorded, changed)[0]


@pytest.mark.slow
def test_the_fast_golden_curves(run_command, monkeypatch, capsys):
    variables = dict(golden.ALONE)
    if not torch.cuda.is_available():
        del variables["CUDA_VISIBLE_DEVICES"]

    def python(words, name, core):
        """As `golden.python`, in forks of one process."""
        done = run_command(*words, variables=variables)
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"

    monkeypatch.setattr(golden, "python", python)
    monkeypatch.setattr("sys.argv", ["golden", "check", "fast"])
    assert golden.main() == 0, capsys.readouterr().out
