"""`scripts.stream`: the thoughts that it shows are the engine's, its pace is kept, and mistakes are
one line."""

import re
import time
from types import SimpleNamespace

import pytest
import torch

from recipes.compose import compose
from rollouts.data.examples import Example
from rollouts.streaming.prompts import streaming_prompts
from scripts.stream import THOUGHT_STYLE, TokenPrinter, arrive, main, sentences_of
from trainers.core.policy import check_model
from trainers.core.rollout import make_engine
from trainers.modes import reading_mode
from trainers.modes.plain import make_requests

QUESTION = "How many pens has he now?"
SENTENCES = ("Dr. Lee has 3.5 boxes.", '"Take two," he said.', "It rains!")
TEXT = f"{SENTENCES[0]} {SENTENCES[1]}\n{QUESTION} {SENTENCES[2]}\n"
LAST = re.compile(
    r"3 sentences, \d <skip>; (\d+) tokens streamed, (\d+) deep; "
    r"answer (\d+\.\d\d) s after the last word\n$"
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def expected(streaming_model):
    """What the batched engine writes on the same text, greedily, as the demonstration shows it."""
    config = compose(
        ["recipe=streaming_sft", f"model.path={streaming_model}", "streaming.max_thought_tokens=6"]
    )
    tokenizer, _ = check_model("model", str(streaming_model))
    example = Example(0, [{"role": "user", "content": ""}], question=QUESTION, sentences=SENTENCES)
    prompts, _ = streaming_prompts([example], tokenizer, config, "data")
    engine = make_engine(config, torch.device("cpu"), torch.float32, 0)
    sampling = reading_mode(config).sampling(
        tokenizer, tokenizer.stop_ids, temperature=0, max_new_tokens=10
    )
    (drawn,) = engine.generate(make_requests(prompts, 1, lambda *_: 0), sampling)
    slots, ends = drawn.slots.tolist(), {tokenizer.convert_tokens_to_ids("<EOT>")}
    texts = []
    for slot in range(4):
        own = [token for token, place in zip(drawn.completion_ids, slots) if place == slot]
        texts.append(tokenizer.decode([token for token in own if token not in ends]))
        ends = set(sampling.stop_ids) if slot == 2 else ends
    body = "".join(f"{sentence}\n    {thought}\n" for sentence, thought in zip(SENTENCES, texts))
    return SimpleNamespace(
        text=f"? {QUESTION}\n{body}    " + texts[3].replace("<EOR>", "\n= ", 1) + "\n",
        streamed=sum(0 <= slot < 3 for slot in slots),
        deep=slots.count(3),
    )


def test_a_file_at_no_pace_and_at_a_given_one(file, streaming_model, expected, capsys):
    arguments = [
        f"model={streaming_model}",
        f"file={file}",
        "max_new_tokens=10",
        "max_thought_tokens=6",
    ]
    seconds = {}
    for pace in ("pace=0", "words_per_minute=1200"):
        started = time.perf_counter()
        assert main([*arguments, pace]) == 0
        seconds[pace] = time.perf_counter() - started
        shown, errors = capsys.readouterr()
        last = LAST.search(shown)
        assert shown[: last.start()] == expected.text and errors == ""
        assert (int(last[1]), int(last[2])) == (expected.streamed, expected.deep) and float(
            last[3]
        ) < seconds[pace]
    assert seconds["words_per_minute=1200"] > 11 * 0.05  # eleven words, twenty a second


def test_a_pipe_whose_first_line_is_the_question(streaming_model, expected, run_command):
    done = run_command(
        "-m",
        "scripts.stream",
        f"model={streaming_model}",
        "words_per_minute=0",
        "max_new_tokens=10",
        "max_thought_tokens=6",
        input=f"{QUESTION}\n" + " ".join(SENTENCES),
    )
    assert done.returncode == 0 and done.stderr == ""
    # no colours where there is no terminal
    assert done.stdout[: LAST.search(done.stdout).start()] == expected.text


def test_a_question_of_its_own_leaves_the_text_whole(file, streaming_model, capsys):
    assert (
        main(
            [
                f"model={streaming_model}",
                f"file={file}",
                "question=Does it rain?",
                "pace=0",
                "max_new_tokens=3",
                "temperature=1",
                "seed=3",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert shown.startswith("? Does it rain?\n") and "4 sentences" in shown
    assert all(f"\n{sentence}\n" in shown for sentence in (*SENTENCES, QUESTION))


def test_sentences_are_found_as_they_arrive():
    words = [
        "Dr. ",
        "Lee ",
        "has ",
        "3.5 ",
        "boxes. ",
        "1. ",
        "He ",
        "left.\n\n",
        "Then ",
        "it ",
        "rained",
    ]
    came = iter([(word, float(when)) for when, word in enumerate(words)])
    found = list(sentences_of(came, None, "text"))
    assert found == [
        ("Dr. Lee has 3.5 boxes.", 5.0),
        ("1. He left.", 8.0),
        ("Then it rained", 10.0),
    ]
    text = '"Go. Run!" he said. They ran.'
    quoted = iter([(f"{word} ", 0.0) for word in text.split()])
    assert [sentence for sentence, _ in sentences_of(quoted, None, "text")] == [
        '"Go. Run!" he said.',
        "They ran.",
    ]
    known = sentences_of(iter([("a", 1.0), ("b.", 2.0), ("c.", 3.0)]), ["a b.", "c."], "text")
    assert list(known) == [("a b.", 2.0), ("c.", 3.0)]


def test_words_keep_coming_while_nobody_looks():
    started, arriving = time.perf_counter(), arrive(["a", "b", "c", "d"], 0.05)
    times = [next(arriving)[1]]
    time.sleep(0.6)
    woke = time.perf_counter()
    times += [when for _, when in arriving]
    assert len(times) == 4 and times[-1] < woke
    assert min(after - before for before, after in zip([started, *times], times)) > 0.045


def test_a_character_of_several_tokens_is_printed_when_it_is_whole(streaming_model, capsys):
    tokenizer, _ = check_model("model", str(streaming_model))
    end = tokenizer.eos_token_id
    printer = TokenPrinter(tokenizer, {end}, THOUGHT_STYLE)
    first, *middle, last = tokenizer("中").input_ids
    for token in (first, *middle):
        printer.add(token)
    assert capsys.readouterr().out == ""
    printer.add(last)
    assert capsys.readouterr().out == "中"
    printer.add(first)
    printer.add(end)
    assert capsys.readouterr().out == ""
    printer.flush()
    assert capsys.readouterr().out == "\ufffd"


@pytest.mark.parametrize(
    "text, arguments, message",
    [
        ("", [], ": the text is empty"),
        (" \n", ["question=Why?"], ": the text is empty"),
        ("no end here", [], ": no sentence end was found in the text"),
        (
            ("A cat " * 90 + "sat. ") * 20,
            ["question=Why?"],
            ": text and thoughts are longer than the model's context of",
        ),
        (
            TEXT,
            ["streaming.target_offset=2040"],
            ": text and thoughts are longer than the model's context of 2048",
        ),
        ("A <EOS> cat. Why?", [], "holds the protocol token <EOS>; take it out"),
        (
            TEXT,
            ["words_per_minute=fast"],
            "words_per_minute=fast is not a number; give one, 0 for no waiting",
        ),
        (
            TEXT,
            ["streaming.layout=batch"],
            "streaming.layout=batch cannot be shown live; use grouped",
        ),
        (TEXT, ["fast"], "'fast' is not KEY=VALUE; see python -m scripts.stream --help"),
    ],
)
@pytest.mark.parametrize("through", ["file", "stdin"])
def test_mistakes_are_one_line(
    text, arguments, message, through, streaming_model, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "text.txt"
    path.write_text(text)
    if through == "file":
        arguments = [f"file={path}", *arguments]
    else:
        if text.strip() and not any(argument.startswith("question=") for argument in arguments):
            path.write_text(f"Why?\n{text}")
        monkeypatch.setattr("sys.stdin", path.open())
    assert main([f"model={streaming_model}", "pace=0", "max_new_tokens=2", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")


def test_a_missing_file_a_missing_model_and_one_without_the_protocol(
    file, tiny_models, tmp_path, capsys
):
    for arguments, message in (
        ([], "model=… is missing: python -m scripts.stream model=DIR file=PATH"),
        ([f"model={tmp_path / 'none'}"], "none: no such folder"),
        ([f"model={tiny_models['student']}"], "has no token <SEP>, which streaming needs"),
        (["model=x", f"file={tmp_path / 'none'}"], "none cannot be read: No such file"),
        (["model=x", f"file={tmp_path}"], "cannot be read: Is a directory"),
    ):
        assert main([f"file={file}", *arguments]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
