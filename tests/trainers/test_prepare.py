"""Bad input: each ends in one line that names the key or file, before a model loads."""

import json
import shutil

import pytest
import torch

from recipes.compose import compose, to_dict, to_yaml
from recipes.errors import CheckpointError, ConfigError, DataError, ModelError, OnstreamError
from rollouts.data.examples import Example
from trainers.core.checkpoint import FORM, manifest_checksum
from trainers.core.rundir import changed_keys
from trainers.prepare import prepare


def refused(kind, overrides) -> str:
    with pytest.raises(kind) as caught:
        prepare(compose(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sound_run_is_prepared(overrides, tiny_models):
    prepared = prepare(compose(overrides()))
    assert len(prepared.prompts) == 64 and len(prepared.eval_prompts) == 4 and prepared.start == 0
    assert len(prepared.stop_ids) == 2 and prepared.teacher_stop in prepared.stop_ids


@pytest.mark.parametrize("key", ["model__path", "teacher__path"])
def test_a_missing_model(overrides, key):
    assert (
        refused(ModelError, overrides(**{key: "/no/such/model"}))
        == f"{key.replace('__', '.')}=/no/such/model: no such folder"
    )


def test_a_folder_that_is_no_model(overrides, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is not a model folder" in refused(ModelError, overrides(model__path=tmp_path / "empty"))


def test_a_teacher_of_another_vocabulary(overrides, tiny_models, tmp_path):
    other = shutil.copytree(tiny_models["teacher"], tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused(ModelError, overrides(teacher__path=other))
    assert "has another vocabulary than model.path=" in message and "(id 30" in message


def test_a_teacher_that_differs_in_an_added_token(overrides, tiny_models, tmp_path):
    """It was refused, though no sample may hold the token."""
    other = shutil.copytree(tiny_models["teacher"], tmp_path / "other")
    for name in ("tokenizer.json", "chat_template.jinja"):
        text = (other / name).read_text()
        (other / name).write_text(text.replace("<|im_start|>", "<|turn|>"))
    keys = {"teacher__path": other, "rollout__engine": "hf"}
    message = refused(DataError, overrides(**keys))
    assert "the prompt of row 0 has '<|im_start|>', which teacher.path=" in message
    run = prepare(compose(overrides(**keys, data__template="plain")))
    (token,) = run.missing
    assert run.tokenizer.convert_ids_to_tokens(token) == "<|im_start|>"
    assert any("teacher  <|im_start|>: not the same tokens" in line for line in run.messages)


def test_missing_data(overrides):
    assert "/no/such/file.jsonl" in refused(DataError, overrides(data__path="/no/such/file.jsonl"))


def test_an_empty_dataset(overrides, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl" in refused(DataError, overrides(data__path=tmp_path / "empty.jsonl"))


def test_a_row_without_a_prompt(overrides, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"question": "a", "answer": "1"}\n{"question": null, "answer": "1"}\n'
    )
    message = refused(DataError, overrides(data__path=tmp_path / "rows.jsonl"))
    assert "rows.jsonl" in message and "2" in message


@pytest.mark.parametrize(
    "recipe, said",
    [
        (
            "sft",
            "solution, which recipe=sft learns to write; name its column with data.target_column",
        ),
        (
            "proactivellm",
            "solution, which recipe=proactivellm learns to write; name its column with "
            "data.target_column",
        ),
        ("streaming_sft", "thoughts, which recipe=streaming_sft learns to write"),
    ],
)
def test_a_row_without_a_target(overrides, tmp_path, recipe, said):
    (tmp_path / "rows.jsonl").write_text('{"question": "Is it? It is."}\n')
    message = refused(DataError, overrides(recipe=recipe, data__path=tmp_path / "rows.jsonl"))
    assert message == f"data.path={tmp_path}/rows.jsonl: row 0 has no {said}"


@pytest.mark.parametrize("missing", ["thoughts", "final"])
def test_a_streaming_row_without_a_part_of_its_target(overrides, monkeypatch, missing):
    parts = {"thoughts": ("So.",), "final": "37"} | {missing: None}
    example = Example(4, [{"role": "user", "content": "Is it? It is."}], **parts)
    monkeypatch.setattr("trainers.prepare.configured_examples", lambda *_: [example])
    assert (
        f"data.path=d: row 4 has no {missing}, which recipe=streaming_sft learns to write"
        == refused(DataError, overrides(recipe="streaming_sft", data__path="d"))
    )


def test_no_answers_to_evaluate_against(overrides, tmp_path):
    (tmp_path / "bare.jsonl").write_text('{"question": "a"}\n')
    assert "eval.path" in refused(DataError, overrides(eval__path=tmp_path / "bare.jsonl"))


def test_a_run_directory_that_holds_another_run(overrides, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert "already holds a run; continue it with resume=auto" in refused(ConfigError, overrides())


def test_a_corrupt_checkpoint(overrides, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step_2"
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"1")
    (folder / "manifest.json").write_text(
        json.dumps({"step": 2, "files": {"weights.pt": [1, "0" * 32]}})
    )
    assert "weights.pt is corrupt" in refused(CheckpointError, overrides(resume="auto"))


def saved(run, step, **about):
    """A checkpoint of a run, as far as `prepare` reads it."""
    folder = run / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    manifest = {"form": FORM, "step": step, "ranks": 1, "lora": None, "files": {}} | about
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "key, value",
    [
        ("model__dtype", "bfloat16"),
        ("engine", "zero3"),
        ("engine", "zero2_offload"),
    ],
)
def test_a_resume_with_another_engine_goes_on(overrides, tmp_path, key, value):
    """It was refused: DeepSpeed's files have another form under each."""
    saved(tmp_path / "run", 1, ranks=2)
    keys = {"engine": "zero1"} | {key: value}
    run = prepare(compose(overrides(**keys, resume="auto")))
    assert run.start == 1
    assert "step_1 was saved by 2 ranks, this run has 1" in "\n".join(run.messages)


def test_a_checkpoint_of_an_older_version_is_one_line(overrides, tmp_path):
    saved(tmp_path / "run", 1, form=None)
    message = refused(CheckpointError, overrides(resume="auto"))
    assert "step_1 was saved by another version of Onstream" in message
    assert f"model.path={tmp_path}/run/checkpoints/step_1/model" in message


def test_completions_longer_than_the_context(overrides):
    assert "exceeds the model's context of 2048" in refused(
        ConfigError, overrides(rollout__max_new_tokens=4000)
    )


@pytest.mark.parametrize("lengths, kept", [((5, 3000, 7), 2), ((3000,), 0)])
def test_targets_longer_than_the_context(overrides, tmp_path, lengths, kept):
    """They were trained on at positions that the model does not have."""
    rows = [{"prompt": "Say a.", "completion": "a " * length} for length in lengths]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    keys = overrides(recipe="sft", data__path=file)
    if not kept:
        assert f"data.path={file}: all 1 examples are longer" in refused(DataError, keys)
        return
    run = prepare(compose(keys))
    assert len(run.prompts) == kept
    assert any("1 of 3 examples are longer than the model's context" in m for m in run.messages)


@pytest.mark.parametrize(
    "key, value",
    [
        ("rollout__engine", "vlm"),
        ("reward__token", "powr"),
        ("trainer", "odp"),
        ("reward__verifier", "maths"),
    ],
)
def test_an_unknown_component_names_the_nearest(overrides, key, value):
    message = refused(ConfigError, overrides(**{key: value}))
    assert key.replace("__", ".") in message and "did you mean" in message


def test_the_command_itself_prints_one_line_and_no_traceback(overrides, run_command):
    done = run_command("train.py", *overrides(data__path="/no/such.jsonl"))
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "/no/such.jsonl" in lines[0]


def test_dry_run_checks_and_prints_without_a_run(overrides, run_command, tmp_path):
    done = run_command("train.py", *overrides(dry_run="true"))
    assert (
        done.returncode == 0 and "alpha: 5.0" in done.stdout and "# ok: 64 prompts" in done.stdout
    )
    assert not (tmp_path / "run").exists()


def test_every_error_of_ours_is_one_kind():
    assert all(
        issubclass(kind, OnstreamError)
        for kind in (CheckpointError, ConfigError, DataError, ModelError)
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so Triton can run")
def test_triton_without_a_gpu(overrides, monkeypatch):
    monkeypatch.setattr("kernels.backend._selected", "auto")  # put back what the run selects
    assert "kernels.backend=triton: backend triton needs an NVIDIA GPU" in refused(
        ConfigError, overrides(kernels__backend="triton")
    )


def test_a_config_of_an_older_version_differs_in_nothing_that_the_run_reads(tmp_path, overrides):
    """Older config.yaml files hold every method's keys, and a value under its older name."""
    config = compose(overrides())
    older = to_dict(config) | {"grpo": {"kl_beta": 0.001}, "hrpo": {"local_weight": 0.5}}
    older["train"]["normalizer"] = "window_token_mean"
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(older))
    assert changed_keys(saved, config) == []
    older["train"]["lr"] = 1.0
    saved.write_text(to_yaml(older))
    assert changed_keys(saved, config) == ["train.lr"]


def test_paths_with_a_tilde_and_any_letter_work(overrides, tiny_models, tmp_path, monkeypatch):
    """Each key of a path, and what a resume reads."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "x (1), [a]=ä/日本 #"
    for name, path in tiny_models.items():
        shutil.copytree(path, folder / name)
    rows = [{"prompt": f"{n}+1?", "answer": str(n + 1)} for n in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text("")
    keys = {
        "model__path": "student",
        "teacher__path": "teacher",
        "data__path": "data.jsonl",
        "eval__path": "data.jsonl",
    }
    home = "~/x (1), [a]=ä/日本 #"
    paths = {key: f"{home}/{name}" for key, name in keys.items()}
    prepared = prepare(compose(overrides(**paths, run__dir=f"{home}/new")))
    assert len(prepared.prompts) == 8 and prepared.directory == folder / "new"
    assert "already holds a run" in refused(ConfigError, overrides(**paths, run__dir=f"{home}/run"))
    resumed = overrides(**paths, run__dir="elsewhere", resume=f"{home}/run")
    assert "no checkpoint there" in refused(CheckpointError, resumed)
