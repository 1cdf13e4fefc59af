"""A new model for some data: what is written, the tokenizer that is learned, and mistakes in the
arguments."""

import gzip

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.compose import compose
from rollouts.data.load import load_examples
from rollouts.data.translation import MODIFIERS, NOUNS
from rollouts.simultaneous.prompts import target_words, unit_prompts
from scripts.new_model import learn_tokenizer, main
from trainers.core.policy import check_model

SMALL = ("hidden=32", "layers=2", "heads=2", "vocab=800", "data.stories=400")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new") / "model"
    assert main([f"out={folder}", "data=translation", *SMALL]) == 0
    return folder


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_model_that_a_run_can_start_from(folder):
    tokenizer, config = check_model("model.path", str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (
        config.model_type,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
    ) == ("qwen3", 32, 2, 2)
    assert config.vocab_size == len(tokenizer) == model.lm_head.weight.shape[0] <= 800
    assert (
        tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
        and tokenizer.bos_token is None
    )
    assert tokenizer.stop_ids == (tokenizer.eos_token_id,) and tokenizer.chat_template is None
    logits = model(torch.tensor([tokenizer("rula dana").input_ids])).logits[0, -1]
    assert logits.softmax(-1).max() < 0.1  # untrained


def test_every_word_of_the_data_is_one_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [*NOUNS, *MODIFIERS, *NOUNS.values(), *MODIFIERS.values()]
    assert all(len(ids) == 1 for ids in tokenizer([f" {word}" for word in words]).input_ids)
    assert tokenizer.decode(tokenizer("Ünï 中文 \n\n x  12").input_ids) == "Ünï 中文 \n\n x  12"


def test_units_and_words_of_the_data(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples, config = load_examples("translation", size=5), compose(["recipe=proactivellm"])
    prompts, dropped = unit_prompts(examples, tokenizer, config, "d")
    assert dropped == 0
    for prompt in prompts:
        source, target = prompt.example.messages[0]["content"], prompt.example.solution
        assert (
            tokenizer.decode(prompt.token_ids)
            == f"<|endoftext|>{source}<|endoftext|>"
            == prompt.text
        )
        assert len(prompt.segments) == 1 + len(source.split())
        *words, end = target_words(target, tokenizer)
        assert tokenizer.decode(sum(words, ())) == target and end == (tokenizer.eos_token_id,)


def test_weights_follow_from_the_seed(folder, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        assert main([f"out={tmp_path / name}", "data=translation", *SMALL, f"seed={seed}"]) == 0
    first, same, other = (weights(path) for path in (folder, tmp_path / "same", tmp_path / "other"))
    assert all((same[name] == first[name]).all() for name in first)
    assert (other["lm_head.weight"] != first["lm_head.weight"]).any()


def test_columns_of_line_aligned_text(tmp_path, capsys):
    for language, text in (("en", "a lighthouse\n"), ("de", "ein Leuchtturm\n")):
        with gzip.open(tmp_path / f"train.{language}.gz", "wt") as file:
            file.write(text * 20)
    assert (
        main(
            [
                f"out={tmp_path / 'model'}",
                f"data={tmp_path}",
                "data.prompt_column=en",
                "data.target_column=de",
                *SMALL[:3],
            ]
        )
        == 0
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert all(len(tokenizer(word).input_ids) == 1 for word in (" lighthouse", " Leuchtturm"))
    assert "1.00 of them per word of 40 texts" in capsys.readouterr().out


def test_joined_words_have_the_ids_of_the_text():
    tokenizer = learn_tokenizer(["a dog, an apple's core; 42 dogs"] * 9, 400)
    text = "an apple, a dog's 402 cores -- (and so on)!"
    ids = [
        tokenizer(word if place == 0 else f" {word}").input_ids
        for place, word in enumerate(text.split())
    ]
    assert [token for word in ids for token in word] == tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids[4])[1:] == ["0", "2"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["out=OUT"], "data=… is missing"),
        (["data=translation"], "out=… is missing"),
        (["out=OUT", "data=translation", "hiden=3"], "no key 'hiden'; did you mean 'hidden'?"),
        (
            ["out=OUT", "data=translation", "data.target=de"],
            "no key 'data.target'; did you mean 'data.target_column'?",
        ),
        (["out=OUT", "data=translation", "train.steps=3"], "no key 'train.steps'"),
        (["out=OUT", "data=translation", "layers"], "'layers' is not KEY=VALUE"),
        (["out=OUT", "data=translation", "vocab=256"], "vocab=256 must be 257 or more"),
        (["out=OUT", "data=translation", "layers=0"], "layers=0 must be a whole number, 1 or more"),
        (["out=OUT", "data=translation", "hidden=4e2"], "hidden=4e2 must be a whole number"),
        (
            ["out=OUT", "data=translation", "hidden=100", "heads=4"],
            "hidden=100 must be an even multiple of heads=4",
        ),
        (["out=OUT", "data=translation", "data.stories=no"], "data.stories"),
        (["out=OUT", "data=/nowhere"], "/nowhere: no such file or folder"),
        (["out=.", "data=translation"], "out=. exists"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, arguments, said):
    assert main([argument.replace("OUT", str(tmp_path / "out")) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not (tmp_path / "out").exists()
