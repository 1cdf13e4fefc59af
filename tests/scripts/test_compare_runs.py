"""`scripts.compare_runs`: equal runs are equal whatever the clock said, and any other value is
named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.compare_runs import differences, main


@pytest.fixture
def runs(tmp_path):
    """A run of two steps, and one whose clock went otherwise."""
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        folder = tmp_path / name / "checkpoints" / "step_2" / "model"
        folder.mkdir(parents=True)
        rows = [{"step": 0, "eval/stories/latency_s": seconds, "eval/stories/avg@2": None}]
        rows += [{"step": s, "train/loss": 0.5 * s, "time/step": seconds} for s in (1, 2)]
        for file in ("metrics.jsonl", "completions.jsonl"):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (tmp_path / name / file).write_text(text)
        save_file({"weight": torch.tensor([0.0, float("nan")])}, folder / "model.safetensors")
        (folder.parent / "random_0.json").write_text("{}")
    return tmp_path / "a", tmp_path / "b"


def test_what_a_clock_decides_does_not_count(runs, capsys):
    assert differences(*runs) == []
    assert main([*map(str, runs)]) == 0
    assert capsys.readouterr().out == "equal\n"


def edit(file, old, new):
    file.write_text(file.read_text().replace(old, new))


def negative_zero(run):
    file = run / "checkpoints/step_2/model/model.safetensors"
    save_file({"weight": load_file(file)["weight"] * torch.tensor([-1.0, 1.0])}, file)


@pytest.mark.parametrize(
    "change, line",
    [
        (
            lambda run: edit(run / "metrics.jsonl", '"train/loss": 1.0', '"train/loss": 1.5'),
            "metrics.jsonl: step 2, train/loss: 1.0 and 1.5",
        ),
        (
            lambda run: edit(run / "metrics.jsonl", '"step": 1,', '"step": 2,'),
            "metrics.jsonl: its rows are of the steps 0-2 and 0, 2, 2",
        ),
        (
            lambda run: edit(run / "completions.jsonl", '{"step": 2', '{"step": 2, "x": "a\u2028"'),
            'completions.jsonl: step 2, x: null and "a\u2028"',
        ),
        (
            negative_zero,
            "step_2/model/model.safetensors: 1 of 1 tensors differ, by up to nan in weight",
        ),
        (
            lambda run: (run / "checkpoints/step_2/random_0.json").write_text("[]"),
            "step_2/random_0.json differs",
        ),
        (
            lambda run: (run / "checkpoints/step_2").rename(run / "checkpoints/step_1"),
            "checkpoints: the newest are step_2 and step_1",
        ),
        (
            lambda run: shutil.rmtree(run / "checkpoints"),
            "checkpoints: 1 of the two runs have one",
        ),
    ],
)
def test_any_other_difference_is_a_line(runs, change, line, capsys):
    change(runs[1])
    assert differences(*runs) == [line]
    assert main([*map(str, runs)]) == 1
    assert capsys.readouterr().out == f"{line}\n"


def test_a_run_without_records_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path)]) == 1
    assert "metrics.jsonl cannot be read" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert "give two run directories" in capsys.readouterr().err
