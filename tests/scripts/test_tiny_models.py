"""The embedded models: the files are those of the manifest, a name is their folder, and they can be
made again."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import embedded
from recipes.compose import compose
from recipes.errors import ModelError
from rollouts.data.stories import story
from rollouts.streaming.tokens import missing
from scripts import tiny_models
from trainers.core.policy import check_model


def test_the_files_are_those_of_the_manifest():
    entries = tiny_models.check(embedded.FOLDER)
    assert sorted(entries) == embedded.names() == sorted(tiny_models.MODELS)
    for name, entry in entries.items():
        assert entry["commit"] != "unknown" and entry["command"].endswith(name)
        made_with = json.loads(json.dumps(tiny_models.asdict(tiny_models.MODELS[name])))
        assert entry["spec"] == made_with, f"{name} was made with other settings; make it again"
        assert ("evaluation" in entry) == bool(tiny_models.MODELS[name].evaluation)


def test_all_of_them_take_less_than_8_mb():
    sizes = [size for entry in embedded.manifest().values() for size, _ in entry["files"].values()]
    assert sum(sizes) < 8e6


def test_the_teacher_is_30_points_above_the_student():
    accuracy = {
        name: entry["evaluation"]["avg@8"]
        for name, entry in embedded.manifest().items()
        if "evaluation" in entry
    }
    assert accuracy["stories-teacher"] - accuracy["stories-student"] >= 0.3


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda folder: (folder / "config.json").write_text("{}"),
            "config.json is not the file that",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "more.txt").write_text("x"), "more.txt is not in"),
    ],
)
def test_a_changed_file_is_named(tmp_path, change, said):
    shutil.copytree(embedded.FOLDER, tmp_path / "models")
    change(tmp_path / "models" / "stories-student")
    with pytest.raises(ModelError, match=said):
        tiny_models.check(tmp_path / "models")


def test_a_name_is_a_folder_of_the_project(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = compose(["recipe=poweropd"])
    for key, path, end in (
        ("model.path", config.model.path, "<|endoftext|>"),
        ("teacher.path", config.teacher.path, "<|im_end|>"),
    ):
        tokenizer, model = check_model(key, path)
        assert tokenizer.eos_token == end and model.vocab_size == len(tokenizer)
    # a run's config names it, wherever the checkout lies
    assert config.model.path == "stories-student"
    assert not list(tmp_path.iterdir())
    assert embedded.model_folder("~/mine") == f"{tmp_path}/mine"
    assert embedded.model_folder("Qwen/Qwen3-0.6B-Base") == "Qwen/Qwen3-0.6B-Base"


def test_a_misspelt_name_gives_the_nearest():
    with pytest.raises(ModelError, match="no such folder; did you mean 'stories-student'"):
        check_model("model.path", "stories-studnet")


def test_the_start_of_hrpo_has_the_protocol_tokens():
    folder = embedded.model_folder(compose(["recipe=adasr"]).model.path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert missing(tokenizer) == []
    assert AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.shape[0] == len(tokenizer)


def test_a_shortened_remake_works(run_command, tmp_path):
    """The teacher goes on from the student that is there, and not from the embedded one."""
    untrained = replace(tiny_models.MODELS["stories-student"], steps=0, evaluation=())
    tiny_models.make("stories-student", untrained, tmp_path)
    names = ["translation-untrained", "stories-teacher"]
    done = run_command(
        "-m", "scripts.tiny_models", "--remake", *names, "--steps", "2", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    entries = tiny_models.check(tmp_path)
    assert sorted(entries) == sorted(["stories-student", *names])
    assert entries["stories-teacher"]["spec"]["steps"] == 2
    assert 0 <= entries["stories-teacher"]["evaluation"]["avg@8"] <= 1
    student, teacher, embedded_one = (
        torch.cat([tensor.flatten() for tensor in model.state_dict().values()])
        for model in map(
            AutoModelForCausalLM.from_pretrained,
            (
                tmp_path / "stories-student",
                tmp_path / "stories-teacher",
                embedded.FOLDER / "stories-student",
            ),
        )
    )
    assert 0 < (teacher - student).norm() < 0.1 * (teacher - embedded_one).norm()


def test_an_unknown_model_is_one_line(capsys):
    assert tiny_models.main(["--remake", "stories-studnet"]) == 1
    assert capsys.readouterr().err == (
        "error: there is no model 'stories-studnet'; did you mean 'stories-student'?\n"
    )


def test_streaming_thoughts_fit_their_limit():
    tokenizer = tiny_models.make_tokenizer("<|endoftext|>")
    difficulty, limit = (
        tiny_models.MODELS["stories-streaming"].difficulty,
        compose(["recipe=adasr"]).streaming,
    )
    lengths = [
        len(tokenizer(thought).input_ids) + 1
        for i in range(500)
        for thought in story(0, i, "train", difficulty, distractors=2, varied=True).thoughts
    ]
    assert max(lengths) <= limit.max_thought_tokens


def test_the_vocabulary_can_be_padded(tmp_path):
    spec = tiny_models.TinyModel(
        end="<|im_end|>", steps=0, seed=0, hidden=32, layers=1, vocab_size=1000
    )
    tiny_models.initialise(tmp_path / "wide", spec)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").lm_head.weight.shape == (
        1000,
        32,
    )


@pytest.mark.parametrize(
    "text", ["Mia has 34 shells.", "Ünï 中文 \n\n x  12", "<|im_start|>user\n7<|im_end|>", "\t🙂"]
)
def test_the_tokenizer_keeps_any_text(text):
    tokenizer = tiny_models.make_tokenizer("<|endoftext|>")
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_each_digit_is_a_token():
    tokenizer = tiny_models.make_tokenizer("<|endoftext|>")
    assert [tokenizer.decode([i]) for i in tokenizer("40 + 375").input_ids] == [
        "4",
        "0",
        " +",
        " 3",
        "7",
        "5",
    ]
