"""RUN/start, the copy of a model that has a method's tokens, is of the model that the run names."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.compose import compose
from trainers.prepare import prepare
from trainers.start_model import source_of, start_model


@pytest.fixture
def run(overrides):
    def make(**keys):
        keys = {"recipe": "streaming_sft", "eval__every": -1, "data__stories": 8} | keys
        return prepare(compose(overrides(**keys)))

    return make


def test_a_copy_is_taken_only_if_it_was_made_of_the_same_files(run, tiny_models, tmp_path):
    """That of an earlier attempt was taken, of whatever model it was."""
    first = start_model(run())
    file = tmp_path / "run" / "start" / "model.safetensors"
    assert first == str(file.parent)
    made, weights = file.stat().st_mtime_ns, load_file(file)
    again = run()
    assert start_model(again) == first and file.stat().st_mtime_ns == made
    assert not any("made anew" in text for text in again.messages)
    other = run(model__path=tiny_models["teacher"])
    assert start_model(other) == first
    assert f"model  {first} was of other files and is made anew" in other.messages
    changed = load_file(file)
    assert any(not torch.equal(changed[name], weights[name]) for name in weights)
    # One of an older version does not say what it was made of; one may be half made.
    (file.parent / "source.json").unlink()
    (tmp_path / "run" / "start.part").mkdir()
    (tmp_path / "run" / "start.part" / "model-00001-of-00002.safetensors").touch()
    start_model(run())
    assert torch.equal(
        load_file(file)["model.embed_tokens.weight"], weights["model.embed_tokens.weight"]
    )
    assert not (file.parent / "model-00001-of-00002.safetensors").exists()


def test_a_source_is_its_files(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    before = source_of(str(tmp_path))
    assert json.loads(json.dumps(before)) == before == source_of(str(tmp_path))
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert source_of(str(tmp_path)) != before
    assert source_of("nobody/nothing") == {"model": "nobody/nothing", "commit": None}
