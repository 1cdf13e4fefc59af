"""Checkpoints: only whole ones count, and a broken one is named."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recipes.compose import compose, to_yaml
from recipes.errors import CheckpointError, ConfigError
from trainers.core import checkpoint
from trainers.core.checkpoint import set_aside
from trainers.core.rundir import run_directory
from trainers.core.tracking import Tracker, keep_through

WORKER = Path(__file__).with_name("checkpoint_worker.py")


class Writes:
    """Stands where the policy engine stands in `checkpoint.save`: it writes files of known
    content."""

    def __init__(self, fail=False):
        self.fail = fail

    def save_state(self, folder):
        (folder / "weights.pt").write_bytes(b"w" * 1000)
        if self.fail:
            raise KeyboardInterrupt
        return [folder / "weights.pt"]

    adapted = ()

    def save_model(self, folder, tokenizer, stop_ids):
        folder.mkdir()
        (folder / "config.json").write_text("{}")


FACTS = {"lora": None}


def save(run, step, **kwargs):
    return checkpoint.save(run, step, Writes(**kwargs), None, (), FACTS, keep=2)


def make(run, *steps):
    """A run with the records of an attempt, and these checkpoints."""
    for step in steps:
        save(run, step)
    (run / "metrics.jsonl").touch()
    return run


def chosen(*keys, facts=FACTS):
    """What a run with these keys continues, and the remarks."""
    messages = []
    return *run_directory(compose([*map(str, keys)]), facts, messages), messages


def test_the_newest_whole_checkpoint_is_found_and_old_ones_go(tmp_path):
    for step in (2, 4, 10):
        save(tmp_path, step)
    assert [p.name for p in checkpoint.complete(tmp_path)] == ["step_4", "step_10"]
    point = checkpoint.find(tmp_path)
    assert point.name == "step_10" and checkpoint.verify(point)["step"] == 10


def test_a_run_that_goes_back_keeps_its_new_checkpoints(tmp_path):
    """New ones were deleted as they were saved, and auto went on with the old branch."""
    for step in (2, 4, 6):
        checkpoint.save(tmp_path, step, Writes(), None, (), FACTS, keep=3)
    assert save(tmp_path, 3).is_dir()
    notes = set_aside(tmp_path, 2)
    assert len(notes) == 3 and "step_6.replaced_1" in notes[-1]
    save(tmp_path, 4)
    assert checkpoint.find(tmp_path).name == "step_4"
    assert set_aside(tmp_path, 2)  # and once more
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    names = {"step_3.replaced_1", "step_4.replaced_1", "step_4.replaced_2", "step_6.replaced_1"}
    assert left == {"step_2", *names}


def test_the_tracker_of_a_run_that_goes_back_says_so(tmp_path, overrides, capsys):
    for step in (2, 4):
        save(tmp_path, step)
    Tracker(compose(overrides()), tmp_path, 2, lambda scores: "").finish()
    assert "step_4 is of an earlier attempt; it is step_4.replaced_1" in capsys.readouterr().out
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_2"]


class WritesTensors(Writes):
    def save_state(self, folder):
        save_file({"weight": torch.zeros(1_000_000)}, folder / "large.safetensors")


class WritesModel(Writes):
    def save_model(self, folder, tokenizer, stop_ids):
        super().save_model(folder, tokenizer, stop_ids)
        save_file({"weight": torch.zeros(1_000_000)}, folder / "model.safetensors")


class WritesText(Writes):
    def save_model(self, folder, tokenizer, stop_ids):
        super().save_model(folder, tokenizer, stop_ids)
        (folder / "tokenizer.json").write_text("a" * 1_000_000)


@pytest.mark.parametrize("engine", [WritesTensors, WritesModel, WritesText])
def test_a_full_disk_is_one_line_with_folder_and_space(tmp_path, small_files, engine):
    """It was an error of PyTorch's about a position, and the half-written folder stayed."""
    save(tmp_path, 2)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(tmp_path, 4, engine(), None, (), FACTS, keep=2)
    message = str(caught.value)
    assert "\n" not in message and f"{tmp_path}/checkpoints/step_4 could not be written" in message
    assert re.search(r"has [\d.]+ of [\d.]+ GiB free; make room", message)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_2"]


def test_another_error_of_a_save_is_not_taken_for_a_full_disk(tmp_path):
    class Fails(Writes):
        def save_model(self, folder, tokenizer, stop_ids):
            raise RuntimeError("a tensor has another shape")

    with pytest.raises(RuntimeError, match="another shape"):
        checkpoint.save(tmp_path, 2, Fails(), None, (), FACTS, keep=2)


def test_leftovers_go_before_a_save_and_at_a_start(tmp_path, overrides):
    """The partial folder of step 4 stayed until step 4 was saved again."""
    left = tmp_path / "checkpoints" / ".step_4.partial"
    (left / "state").mkdir(parents=True)
    save(tmp_path, 2)
    assert not left.exists()
    left.mkdir()
    Tracker(compose(overrides()), tmp_path, 2, lambda scores: "").finish()
    assert not left.exists()


def test_an_old_checkpoint_that_cannot_be_removed_is_a_remark(tmp_path, monkeypatch, capsys):
    """As where another process holds a file of it, on NFS."""
    save(tmp_path, 2)

    def busy(path, *, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        save(tmp_path, 4)
        save(tmp_path, 6)
    assert "step_2 could not be removed" in capsys.readouterr().out
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_4", "step_6"]
    save(tmp_path, 8)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step_6", "step_8"}


def test_files_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.readlink(f"/proc/self/fd/{fd}")))
    folder = save(tmp_path, 2)
    partial = folder.with_name(".step_2.partial")
    inside = {str(partial / path.relative_to(folder)) for path in folder.rglob("*")}
    assert set(flushed[:-1]) == {*inside, str(partial)}
    assert flushed[-1] == str(folder.parent)


@pytest.fixture
def two_ranks(run_command, tmp_path, monkeypatch):
    """What each of two ranks said of a save and of resumes."""
    monkeypatch.setenv("PYTHONPATH", str(WORKER.parents[2]))

    def run(place: str) -> list:
        done = run_command(WORKER, tmp_path, place, ranks=2)
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads((tmp_path / f"said_{rank}").read_text()) for rank in (0, 1)]

    return run


def test_ranks_that_do_not_share_a_file_system_are_told_so(two_ranks, tmp_path):
    """Rank 0 reported a checkpoint without the other rank's part as saved. A resume hung."""
    for rank, (said, resumed) in enumerate(two_ranks("own")):
        assert "of rank 1 is not where rank 0 writes" in said
        assert not list((tmp_path / f"run_{rank}").glob("checkpoints/.*"))
        assert resumed[0].startswith("rank 1 finds step_2 in ")
        assert "rank 0 finds step_1; run.dir and resume must be the same folders" in resumed[0]


def test_ranks_choose_a_checkpoint_together(two_ranks, tmp_path):
    first, second = two_ranks("shared")
    assert first == second
    saved, whole, damaged = first
    assert saved == "step_2" and whole[:2] == damaged[:2] == ["step_2", 2]
    assert "step_4/state/part_1 is corrupt (its checksum differs); an earlier" in damaged[2][0]
    listed = json.loads((tmp_path / "run/checkpoints/step_2/manifest.json").read_text())["files"]
    assert sorted(listed) == ["random_0.json", "random_1.json", "state/part_0", "state/part_1"]


def test_a_half_written_checkpoint_is_never_picked_up(tmp_path):
    save(tmp_path, 2)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 4, fail=True)
    assert checkpoint.find(tmp_path).name == "step_2"
    save(tmp_path, 4)  # and does not stand in the way of the next attempt
    assert checkpoint.find(tmp_path).name == "step_4"


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        checkpoint.find(tmp_path)


def changed(folder, old, new):
    """One part of a manifest becomes another."""
    manifest = folder / "manifest.json"
    assert old in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(old, new))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: (p / "state" / "weights.pt").write_bytes(b"x" * 1000), "weights.pt is corrupt"),
        (lambda p: (p / "state" / "weights.pt").write_bytes(b"w" * 10), "weights.pt is corrupt"),
        (lambda p: (p / "model" / "config.json").unlink(), "config.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda p: changed(p, '"step": 2', '"step": 1'), "its own checksum differs"),
        (lambda p: changed(p, '"form"', '"fork"'), "its own checksum differs"),
        (lambda p: changed(p, '"checksum"', '"checksun"'), "its own checksum differs"),
    ],
)
def test_a_damaged_checkpoint_names_the_file(tmp_path, damage, message):
    folder = save(tmp_path, 2)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.verify(checkpoint.find(folder))
    assert "\n" not in str(caught.value)


def check(folder, facts):
    checkpoint.check_facts(folder, checkpoint.verify(folder), facts)


def test_other_parameters_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="was saved with lora=None, this run has lora of"):
        check(save(tmp_path, 2), {"lora": "lora of rank 3"})


def test_auto_without_a_run_directory_continues_the_newest_run_of_the_recipe(tmp_path):
    default = f"run.dir={tmp_path / '2026-11-20_13-00-00'}"
    for name in ("2026-11-20_10-00-00", "2026-11-20_11-00-00"):
        run = make(tmp_path / name, 4)
        (run / "config.yaml").write_text(to_yaml(compose([f"run.dir={run}"])))
    (tmp_path / "2026-11-20_12-00-00").mkdir()  # died before its first checkpoint
    run, point, start, _ = chosen(default, "resume=auto")
    assert run.name == "2026-11-20_11-00-00" and start == 4
    assert point == run / "checkpoints" / "step_4"
    mine = tmp_path / "mine"
    assert chosen(f"run.dir={mine}", "resume=auto")[:3] == (mine, None, 0)


@pytest.mark.parametrize(
    "key, goes_on",
    [
        ("seed=7", False),
        ("model.path=other", False),
        ("data.path=other.jsonl", False),
        ("data.stories=41", False),
        ("train.lr=1", True),
        ("train.steps=200", True),
    ],
)
def test_auto_without_a_run_directory_takes_no_other_run(tmp_path, key, goes_on):
    """It continued the newest run of the recipe, whatever it had been trained on."""
    default = tmp_path / "2026-11-20_13-00-00"
    for name, keys in (("2026-11-20_10-00-00", [key]), ("2026-11-20_11-00-00", ["seed=9"])):
        run = make(tmp_path / name, 4)
        (run / "config.yaml").write_text(to_yaml(compose(keys)))
    same = tmp_path / "2026-11-20_10-00-00"
    # Behind a newer run of another seed.
    assert chosen(f"run.dir={default}", "resume=auto", key)[0] == same
    directory, _, _, messages = chosen(f"run.dir={default}", "resume=auto")
    assert directory == (same if goes_on else default)
    if not goes_on:
        assert "11-00-00 is another run (differs: seed) and stays as it is" in messages[0]


def test_auto_takes_the_checkpoint_before_a_damaged_one(tmp_path):
    run = make(tmp_path / "run", 2, 4)
    first, second = checkpoint.complete(run)
    (second / "model" / "config.json").unlink()
    _, point, start, messages = chosen(f"run.dir={run}", "resume=auto")
    assert (point, start) == (first, 2)
    assert f"{second}/model/config.json is missing; an earlier one is taken" in messages[0]
    # Facts that differ are no damage.
    with pytest.raises(CheckpointError, match="saved with lora=None"):
        chosen(f"run.dir={run}", "resume=auto", facts={"lora": "lora of rank 3"})
    (first / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="no other checkpoint of the run is whole"):
        chosen(f"run.dir={run}", "resume=auto")


def test_a_checkpoint_continues_its_own_run(tmp_path):
    run = make(tmp_path / "run", 2, 4)
    point = run / "checkpoints" / "step_2"
    assert chosen(f"run.dir={run}", f"resume={point}")[:3] == (run, point, 2)
    default = f"run.dir={tmp_path / '2026-11-20_13-00-00'}"
    assert chosen(default, f"resume={point}")[:3] == (run, point, 2)
    assert chosen(default, f"resume={run}")[2] == 4


@pytest.mark.parametrize("name", ["mine", "2026-11-20_13-00-00"])
@pytest.mark.parametrize("place", ["backup/step_2", "backup/mine", "run/checkpoints/step_2.x"])
def test_a_copied_checkpoint_starts_a_run_in_its_own_directory(tmp_path, name, place):
    """The grandparent of the copy was taken for its run."""
    source = checkpoint.find(make(tmp_path / "run", 2))
    copy = shutil.copytree(source, tmp_path / place)
    new = tmp_path / "new" / name
    run, point, start, messages = chosen(f"run.dir={new}", f"resume={copy}")
    assert (run, point, start) == (new, copy, 2)
    assert messages[0] == f"resume  {new} is a new run, whose records begin at 3"


def test_a_run_directory_that_was_given_is_a_new_run(tmp_path):
    """It was ignored, and the records of the checkpoint's run were cut."""
    run, other = make(tmp_path / "run", 2, 4), make(tmp_path / "other", 2)
    point = run / "checkpoints" / "step_2"
    new = tmp_path / "new"
    for resume, step in ((point, 2), (run, 4)):
        directory, _, start, messages = chosen(f"run.dir={new}", f"resume={resume}")
        assert (directory, start) == (new, step) and "is a new run" in messages[0]
    with pytest.raises(ConfigError, match="other already holds a run"):
        chosen(f"run.dir={other}", f"resume={point}")


def test_the_remedy_for_a_damaged_checkpoint_can_be_followed(tmp_path):
    run = make(tmp_path / "run", 2, 4)
    first, second = checkpoint.complete(run)
    copy = shutil.copytree(second, tmp_path / "copy")
    for folder in (copy, second, first):
        (folder / "model" / "config.json").unlink()
        with pytest.raises(CheckpointError) as caught:
            chosen(f"run.dir={tmp_path / 'new'}", f"resume={folder}")
        remedy = str(caught.value).split("; ", 1)[1]
        assert {copy: "copy that folder again", second: f"resume={first}"}.get(
            folder, "the run has none before it"
        ) in remedy


def test_records_after_the_checkpoint_and_a_cut_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step} for step in (0, 1, 2, 2, 3, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "tra')
    keep_through(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 2]
