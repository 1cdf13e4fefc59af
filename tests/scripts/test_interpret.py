"""What is shown of a simultaneous model, line by line, and what is refused."""

import io

import pytest

from scripts import interpret, new_model

TEXT = "the old red house sleeps\n\n  a small dog runs  \n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interpret") / "model"
    assert (
        new_model.main(
            [
                f"out={folder}",
                "data=translation",
                "data.stories=50",
                "hidden=32",
                "layers=1",
                "heads=2",
            ]
        )
        == 0
    )
    return folder


def shown(capsys, *arguments: str) -> list[list[str]]:
    capsys.readouterr()
    assert interpret.main(["rollout.max_new_tokens=12", *arguments]) == 0
    return [block.split("\n") for block in capsys.readouterr().out.rstrip("\n").split("\n\n")]


def columns(block: list[str]) -> tuple[list[str], list[str]]:
    width = max(len(line.split("  ")[0]) for line in block)
    return [line[:width].strip() for line in block], [line[width:].strip() for line in block]


def test_the_first_column_is_the_text_and_the_second_what_was_written_then(model, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT)
    common = f"model={model}", f"file={tmp_path / 'text'}"
    whole = [columns(block) for block in shown(capsys, *common, "head=batch")]
    assert [units for units, _ in whole] == [
        ["the", "old", "red", "house", "sleeps"],
        ["a", "small", "dog", "runs"],
    ]
    assert all(not any(texts[:-1]) and texts[-1] for _, texts in whole)
    for block in shown(capsys, *common, "head=wait_k", "setting=2"):
        _, texts = columns(block)
        assert texts[0] == "" and texts[1]


def test_standard_input_and_a_head_that_is_calibrated(model, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    blocks = shown(
        capsys,
        f"model={model}",
        "data=translation",
        "data.stories=20",
        "proactive.calibration_size=3",
        "quantile=1.0",
    )
    assert [len(block) for block in blocks] == [5, 4]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            (),
            "proactive.head=entropy needs a threshold: "
            "give setting=…, or data=… to calibrate it on",
        ),
        (("setting=-1",), "proactive.setting=-1 must be 0 or more (nats) for this head"),
        (("head=wait_k",), "proactive.head=wait_k needs proactive.setting: 1 or more (units)"),
        (("setting=1", "file=/no/such/file"), "file=/no/such/file cannot be read"),
        (("setting=1",), "standard input: the text is empty; give a source a line"),
        (("nothing",), "'nothing' is not KEY=VALUE"),
    ],
)
def test_bad_input_is_one_line(model, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert interpret.main([f"model={model}", *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
