"""The offline cache: the teacher's numbers, shards that go on after a kill, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from recipes.compose import compose
from recipes.errors import ConfigError, DataError, ModelError, OnstreamError
from scripts import cache_teacher
from trainers.core.batching import pack
from trainers.core.policy import load_policy
from trainers.core.progress import Progress
from trainers.core.teacher import Teacher
from trainers.core.teacher_cache import MANIFEST, TeacherCache
from trainers.offline_distillation import OfflineDistillation
from trainers.prepare import prepare

ROWS, TOP_K, SHARD_ROWS = 8, 5, 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny_models):
    """The config of the script, with other keys."""

    def make(**extra):
        keys = {"recipe": "opd", "eval.every": -1, "data.path": "stories", "data.stories": ROWS}
        keys |= {"model.path": tiny_models["student"], "teacher.path": tiny_models["teacher"]}
        keys |= {name.replace("__", "."): value for name, value in extra.items()}
        return compose([f"{name}={value}" for name, value in keys.items()])

    return make


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A finished cache of eight rows in three shards."""
    folder = tmp_path_factory.mktemp("teacher") / "cache"
    cache_teacher.cache(config(), folder, TOP_K, SHARD_ROWS)
    return folder


@pytest.fixture(scope="module")
def targets_alone(config, tmp_path_factory):
    """One without top-k."""
    folder = tmp_path_factory.mktemp("teacher") / "cache"
    cache_teacher.cache(config(), folder, 0, SHARD_ROWS)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of the finished cache."""
    return shutil.copytree(whole, tmp_path / "copy")


@pytest.fixture
def run_with(overrides):
    """A run that reads a cache, prepared."""

    def make(folder, **extra):
        keys = {"recipe": "distill", "data__stories": ROWS, "rollout__engine": "hf"}
        keys |= {"eval__every": -1, "teacher__cache": folder}
        return prepare(compose(overrides(**keys | extra)))

    return make


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def rewrite(folder, change) -> None:
    """Change a file's last byte, which is of a number."""
    path = folder / change
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# What is in it


def test_it_has_the_log_probs_of_the_teacher_in_process(whole, config, run_with):
    run = cache_teacher.prepared(config())
    teacher = Teacher(run.config.teacher, run)
    drawn = [OfflineDistillation(run).read(prompt) for prompt in run.prompts]
    for trajectory in drawn:
        ids = np.array(trajectory.completion_ids, dtype=np.int64)
        trajectory.annotations["teacher_targets"] = ids
    teacher.annotate(drawn)
    model = AutoModelForCausalLM.from_pretrained(run.config.teacher.path, dtype=torch.float32)
    cache = TeacherCache(whole)
    for trajectory in drawn:
        found = cache.read(trajectory.prompt_index)
        expected = trajectory.annotations["teacher_logprobs"]
        np.testing.assert_allclose(found["teacher_logprobs"], expected, atol=1e-6)
        # The whole distributions, of another forward.
        first = len(trajectory.prompt_ids) - 1
        with torch.no_grad():
            logits = model(torch.tensor([trajectory.token_ids])).logits[0, first:-1]
        logprobs = logits[:, : run.vocab].log_softmax(-1)
        ids = torch.from_numpy(found["teacher_topk_ids"])
        likely = torch.from_numpy(found["teacher_topk_logprobs"])
        torch.testing.assert_close(likely, logprobs.gather(1, ids), atol=1e-5, rtol=0)
        torch.testing.assert_close(likely, logprobs.topk(TOP_K).values, atol=1e-5, rtol=0)


def test_the_loss_is_the_kl_with_one_bucket_for_the_rest(whole, targets_alone, run_with):
    for folder, support in ((whole, TOP_K), (targets_alone, 1)):
        run = run_with(folder)
        trainer = OfflineDistillation(run)
        drawn = trainer.draw(0)
        trainer.annotate(drawn)
        batch = pack(drawn, range(len(drawn)), CPU)
        policy = load_policy(run.config.model.path, torch.float32, CPU)
        hidden = policy.hidden(batch).detach()
        output = trainer.loss()(policy.head, hidden, batch, denominator=float(batch.mask.sum()))
        student = (hidden @ policy.head.weight.detach().T)[:, : run.vocab].log_softmax(-1).double()
        ids = batch.annotations["teacher_topk_ids"]
        assert ids.shape[1] == support
        p = batch.annotations["teacher_topk_logprobs"].double().exp()
        q = student.gather(1, ids).exp()
        rest_p, rest_q = 1 - p.sum(1), 1 - q.sum(1)
        kl = (p * (p / q).log()).sum(1) + rest_p * (rest_p / rest_q).log()
        assert float(output["loss"].detach()) == pytest.approx(
            float(kl[batch.mask].mean()), rel=1e-5
        )
        tail = trainer.token_metrics(drawn[0], {})["teacher/tail"][0]
        np.testing.assert_allclose(tail, rest_p[: len(tail)].numpy(), atol=1e-6)
        # Student and teacher end on different tokens.
        assert int((~batch.mask).sum()) == (ROWS if folder == targets_alone else 0)


def test_a_teacher_with_a_prompt_of_its_own_is_another_cache(config, folder):
    taught = config(teacher__prompt="{prompt} {solution}", rollout__max_new_tokens=64)
    with pytest.raises(ConfigError, match="is a cache of another teacher.prompts"):
        cache_teacher.cache(taught, folder, TOP_K, SHARD_ROWS)
    other = folder.with_name("taught")
    cache_teacher.cache(taught, other, TOP_K, SHARD_ROWS)
    plain, seen = (TeacherCache(one).read(0)["teacher_logprobs"] for one in (folder, other))
    assert plain.shape == seen.shape and np.abs(plain - seen).max() > 0.01


# A kill, and the same command again


def test_it_goes_on_after_a_kill_and_leaves_what_is_finished(config, whole, tmp_path, monkeypatch):
    folder = tmp_path / "cache"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Progress, "advance", killed)
        cache_teacher.cache(config(), folder, TOP_K, SHARD_ROWS)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [
        "rows.safetensors",
        "shard_00000.safetensors",
    ]
    with pytest.raises(DataError, match="is not finished: it has 2 of 4 files"):
        TeacherCache(folder)
    (folder / ".shard_00001.safetensors.partial").write_bytes(b"half")
    first = (folder / "shard_00000.safetensors").stat().st_mtime_ns
    assert cache_teacher.cache(config(), folder, TOP_K, SHARD_ROWS)["written"] == ROWS - SHARD_ROWS
    assert (folder / "shard_00000.safetensors").stat().st_mtime_ns == first
    assert contents(folder) == contents(whole)


def test_it_makes_missing_and_corrupt_shards_anew(config, folder, whole):
    (folder / "shard_00002.safetensors").unlink()
    rewrite(folder, "shard_00000.safetensors")
    assert cache_teacher.cache(config(), folder, TOP_K, SHARD_ROWS)["written"] == 5
    assert contents(folder) == contents(whole)


def test_a_finished_cache_is_left_alone(config, folder, monkeypatch):
    monkeypatch.setattr("trainers.core.teachers.make_one", None)  # no teacher is loaded
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.*")}
    assert cache_teacher.cache(config(), folder, TOP_K, SHARD_ROWS)["written"] == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.*")} == times


@pytest.mark.parametrize(
    "keys, top_k, said",
    [
        ({}, 4, "another top_k: 5, and this one has 4"),
        ({"teacher__dtype": "bfloat16"}, TOP_K, "another teacher.dtype: float32"),
        ({"teacher__path": "self"}, TOP_K, "another teacher.weights"),
        ({"data__stories": 7}, TOP_K, "another data.rows: 8, and this one has 7"),
        ({"seed": 1}, TOP_K, "another data.tokens|another data.checksum"),
    ],
)
def test_another_cache_in_the_same_folder_is_refused(config, folder, keys, top_k, said):
    with pytest.raises(ConfigError, match=said) as caught:
        cache_teacher.cache(config(**keys), folder, top_k, SHARD_ROWS)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"out={folder} is a ")


def test_the_script_refuses_in_one_line(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    cases = [
        ({}, TOP_K, "has thesis.tex, and no manifest.json, so it is no cache"),
        ({}, 1000, "top_k=1000: teacher and student share"),
        ({"teacher__url": "http://127.0.0.1:1/v1"}, TOP_K, "serves no top-k"),
        ({"teacher__engine": "vllm"}, TOP_K, "teacher.engine=vllm serves no top-k"),
        ({"rollout__temperature": 0.5}, TOP_K, "a cache is at temperature 1"),
        ({"teachers.a.path": "self"}, TOP_K, "a cache is of one teacher"),
    ]
    for keys, top_k, said in cases:
        with pytest.raises(OnstreamError, match=said) as caught:
            cache_teacher.cache(config(**keys), tmp_path, top_k, SHARD_ROWS)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.glob("*.*")] == ["thesis.tex"]
    words = ["teacher=a", "model=b", "data=c", f"out={tmp_path}", "top_k=-1"]
    assert cache_teacher.main(words) == 1


# Training


@pytest.mark.parametrize(
    "change, kind, said",
    [
        ("shard_00001.safetensors", DataError, "shard_00001.safetensors is corrupt"),
        ("rows.safetensors", DataError, "rows.safetensors is corrupt"),
        ("-shard_00001.safetensors", DataError, "shard_00001.safetensors is missing"),
        ("-manifest.json", ConfigError, "there is no manifest.json"),
        ("data.stories=9", DataError, "has 8 rows, and row 8 of data.path=stories is not among"),
        ("seed=1", DataError, "row 0 of data.path=stories has another prompt or solution"),
        ("data.suffix=x", DataError, "row 0 of data.path=stories has another prompt or solution"),
        ("model.path=STREAMING", ModelError, "is of another vocabulary than model.path="),
        ("teacher.cache=null", ConfigError, "write one with python -m scripts.cache_teacher"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused_before_training(
    folder, run_with, streaming_model, change, kind, said
):
    key, equals, value = change.replace("STREAMING", str(streaming_model)).partition("=")
    if change.startswith("-"):
        (folder / change[1:]).unlink()
    elif not equals:
        rewrite(folder, change)
    extra = {key.replace(".", "__"): value} if equals else {}
    with pytest.raises(kind, match=said) as caught:
        run_with(folder, **extra)
    assert "\n" not in str(caught.value)


def test_a_changed_manifest_is_refused(folder, run_with):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"top_k": 5', '"top_k": 4'))
    with pytest.raises(DataError, match="its own checksum differs"):
        run_with(folder)


def test_data_with_fewer_rows_is_served(folder, run_with):
    run = run_with(folder, data__limit=4, data__stories=ROWS)
    assert len(run.teacher.places) == ROWS


def test_two_steps_from_a_cache(run_command, overrides, whole, tmp_path):
    keys = {"recipe": "distill", "data__stories": ROWS, "rollout__engine": "hf"}
    keys |= {"teacher__cache": whole, "eval__every": -1, "train__lr": 1e-2}
    done = run_command("train.py", *overrides(**keys))
    assert done.returncode == 0, done.stderr
    assert "teacher  " in done.stdout and f"the {TOP_K} most likely tokens of 8 rows" in done.stdout
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert 0 < second["train/loss"] < first["train/loss"]
    assert first["teacher/kl"] == pytest.approx(first["train/loss"], rel=1e-5)
    assert 0 < first["teacher/tail"] < 1
