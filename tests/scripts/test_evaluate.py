"""`scripts.evaluate` with `mode`, on a streaming model with random weights; without it,
tests/trainers/test_run.py."""

import json
import re
import shutil

import pytest

from scripts.evaluate import main, mode_defaults

FIGURES = {
    "streaming_length_mean",
    "deep_length_mean",
    "skip_frac",
    "wait_tokens",
    "latency_s",
    "seconds_per_token",
}
THOUGHTS = "streaming.max_thought_tokens=5"


@pytest.fixture
def evaluate(streaming_model, capsys):
    def run(*arguments) -> dict:
        status = main(
            [
                f"model={streaming_model}",
                "data=stories",
                "k=2",
                "size=5",
                "max_new_tokens=9",
                "data.distractors=2",
                *arguments,
            ]
        )
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return json.loads(printed.out.splitlines()[-1])

    return run


def test_both_modes(evaluate):
    keys = (
        THOUGHTS,
        "streaming.words_per_minute=150",
        "streaming.seconds_per_token=0.1",
    )
    streaming, first = evaluate("mode=streaming", *keys), evaluate("mode=read_then_think", *keys)
    for found in (streaming, first):
        assert set(found) >= FIGURES and 0 <= found["avg@2"] <= found["pass@2"] <= 1
        assert found["prompts"] == 5 and found["samples"] == 2 and found["seconds_per_token"] == 0.1
        assert (
            1 <= found["deep_length_mean"] <= 9
            and found["streaming_length_mean"] > found["skip_frac"]
        )
    assert (streaming["mode"], first["mode"]) == ("streaming", "read_then_think")
    assert streaming["wait_tokens"] < first["wait_tokens"]
    # All of the thinking is exposed if reading comes first, less the answer's tokens after its
    # first.
    whole = 0.1 * (first["streaming_length_mean"] + first["deep_length_mean"])
    assert whole - 0.9 < first["latency_s"] <= whole + 1e-9
    # 5 tokens are written in half a second, while two words come: what is streamed is hidden but
    # for the last thought.
    assert streaming["latency_s"] <= 0.1 * (5 + streaming["deep_length_mean"]) + 1e-9


def test_measured_speed_and_interleaved(evaluate):
    interleaved = ("recipe=streaming_sft", "streaming.layout=interleaved", THOUGHTS)
    found = evaluate(*interleaved, "engine=hf", "size=2")
    assert found["latency_s"] > found["seconds_per_token"] > 0 and "mode" not in found
    assert not FIGURES & set(evaluate("engine=hf", "size=2"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mode=stream"], "mode=stream is not known; did you mean 'streaming'?"),
        (
            ["mode=batch"],
            "mode=batch is not known; one of: read_then_think, simultaneous, streaming",
        ),
        (
            ["mode=streaming", "engine=hf"],
            "rollout.engine=hf cannot sample with streaming.layout=grouped",
        ),
        (
            ["mode=streaming", "data.distractor=1"],
            "there is no key 'data.distractor'; did you mean 'data.distractors'?",
        ),
        (
            ["mode=streaming", "fast"],
            "'fast' is not KEY=VALUE; see python -m scripts.evaluate --help",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, streaming_model, capsys):
    assert main([f"model={streaming_model}", "data=stories", *arguments]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_a_model_without_the_protocol(tiny_models, capsys):
    assert main([f"model={tiny_models['student']}", "data=stories", "mode=streaming"]) == 1
    assert (
        "has no token <SEP>, which streaming needs; run recipe=streaming_sft first"
        in capsys.readouterr().err
    )


def test_all_rows_of_a_file_and_what_was_dropped(tiny_models, tmp_path, capsys):
    """The first 400 rows were measured, and rows without an answer went without a word."""
    file = tmp_path / "rows.jsonl"
    rows = [{"ask": "Say 1.", "gold": "1"}] * 401 + [{"ask": "Say 2.", "gold": None}]
    file.write_text("\n".join(map(json.dumps, rows)))
    keys = [f"model={tiny_models['student']}", f"data={file}", "k=1", "engine=hf"]
    columns = ["eval.prompt_column=ask", "eval.answer_column=gold"]
    assert main([*keys, *columns, "max_new_tokens=1"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["prompts"] == 401
    assert "1 of 402 rows of rows have no answer and were dropped" in printed.err


@pytest.mark.parametrize("mode", [None, "streaming", "read_then_think", "simultaneous"])
def test_every_mode_takes_all_rows_of_a_file(mode):
    """With a mode, the first 400 were taken in silence."""
    assert mode_defaults(mode, "rows.jsonl")["eval.size"] == "null"
    assert "eval.size" not in mode_defaults(mode, "stories")


def test_the_default_limit_is_what_the_context_leaves(tiny_models, tmp_path, capsys):
    """A context of 1,024 tokens, which leaves a prompt no 1,024 new ones, was one line of error."""
    model = shutil.copytree(tiny_models["student"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 24}
    (model / "config.json").write_text(json.dumps(config))
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Say 1.", "answer": "1"}\n')
    keys = [f"model={model}", f"data={file}", "k=1", "engine=hf", "data.template=plain"]
    assert main(keys) == 0
    printed = capsys.readouterr()
    limit = int(re.search(r"rollout\.max_new_tokens=(\d+): more do not fit", printed.err)[1])
    assert 10 < limit < 24
    assert json.loads(printed.out.splitlines()[-1])["length_mean"] <= limit
    assert main([*keys, "max_new_tokens=1024"]) == 1
    assert "exceeds the model's context of 24" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["absent", "cut off", "of another shape"])
def test_a_model_without_whole_weights_is_one_line(damage, tiny_models, tmp_path, capsys):
    """It was a traceback, as only the trainer's own loading was watched."""
    model = shutil.copytree(tiny_models["student"], tmp_path / "model")
    weights = model / "model.safetensors"
    if damage == "absent":
        weights.unlink()
    elif damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        config = json.loads((model / "config.json").read_text()) | {"intermediate_size": 8}
        (model / "config.json").write_text(json.dumps(config))
    assert main([f"model={model}", "data=stories", "k=1", "size=1", "engine=hf"]) == 1
    printed = capsys.readouterr().err
    assert f"error: model {model} cannot be loaded: " in printed and "Traceback" not in printed
