"""The embedded models: made by the sft recipe, kept, the same from the same seed; and their tokenizer."""
import time
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.compose import compose
from rollouts.protocol import missing
from rollouts.stories import story
from scripts import tiny_models


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("ONSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny_models, "MODELS", {name: replace(spec, steps=3, hidden=32, layers=1, prompts=4)
                                                for name, spec in tiny_models.MODELS.items()})


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_models_are_made_once_from_a_seed(small, monkeypatch, tmp_path):
    config = compose(["recipe=poweropd"])
    tiny_models.make_embedded_models(config)
    student, teacher = weights(config.model.path), weights(config.teacher.path)
    assert any((student[name] != teacher[name]).any() for name in student)
    ends = [AutoTokenizer.from_pretrained(path).eos_token for path in (config.model.path, config.teacher.path)]
    assert ends == ["<|endoftext|>", "<|im_end|>"]

    started = time.monotonic()
    assert str(tiny_models.make("stories-teacher")) == config.teacher.path
    assert time.monotonic() - started < 1

    monkeypatch.setenv("ONSTREAM_CACHE", str(tmp_path / "another"))
    again = weights(tiny_models.make("stories-student"))
    assert all((again[name] == student[name]).all() for name in student)


def test_only_the_models_of_the_recipe_are_made(small, tmp_path):
    config = compose(["recipe=onpolicy_sft"])
    tiny_models.make_embedded_models(config)
    assert "stories-verbose-" in config.model.path and config.teacher.path == "stories-teacher"
    made = {path.parent.name.rpartition("-")[0] for path in (tmp_path / "cache").glob("*/config.json")}
    assert "stories-verbose" in made and made <= {"stories-verbose", tiny_models.MODELS["stories-verbose"].start}


def test_the_streaming_model_is_made_by_its_recipe_and_has_the_tokens(small):
    config = compose(["recipe=adasr"])
    tiny_models.make_embedded_models(config)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    assert "stories-streaming-" in config.model.path and missing(tokenizer) == []
    assert weights(config.model.path)["lm_head.weight"].shape[0] == len(tokenizer)


def test_streaming_thoughts_fit_their_limit():
    tokenizer = tiny_models.make_tokenizer("<|endoftext|>")
    difficulty, limit = tiny_models.MODELS["stories-streaming"].difficulty, compose(["recipe=adasr"]).streaming
    lengths = [len(tokenizer(thought).input_ids) + 1 for i in range(500) for thought in
               story(0, i, "train", difficulty, distractors=2, varied=True).thoughts]
    assert max(lengths) <= limit.max_thought_tokens


def test_the_vocabulary_can_be_padded(tmp_path):
    spec = tiny_models.TinyModel(end="<|im_end|>", steps=0, seed=0, hidden=32, layers=1, vocab_size=1000)
    tiny_models.initialise(tmp_path / "wide", spec)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").lm_head.weight.shape == (1000, 32)


@pytest.mark.parametrize("text", ["Mia has 34 shells.", "Ünï 中文 \n\n x  12", "<|im_start|>user\n7<|im_end|>", "\t🙂"])
def test_the_tokenizer_keeps_any_text(text):
    tokenizer = tiny_models.make_tokenizer("<|endoftext|>")
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_each_digit_is_a_token():
    tokenizer = tiny_models.make_tokenizer("<|endoftext|>")
    assert [tokenizer.decode([i]) for i in tokenizer("40 + 375").input_ids] == ["4", "0", " +", " 3", "7", "5"]
