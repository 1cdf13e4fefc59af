"""What `scripts.inspect` shows of data and models."""

import json

import pytest

from scripts import inspect


@pytest.fixture
def shown(tmp_path, capsys):
    """The output for rows of a file, by label; a part without one belongs to the part before it."""

    def show(*rows, model="stories-student", **keys) -> dict[str, str]:
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        arguments = [f"{name}={value}" for name, value in keys.items()]
        assert inspect.main([f"data={file}", f"model={model}", *arguments]) == 0
        parts: dict[str, str] = {}
        label = ""
        for line in capsys.readouterr().out.splitlines():
            label = line[:10].strip() or label if line[9:10] == " " else label
            parts[label] = parts.get(label, "") + line[10:] + "\n"
        return parts

    return show


def test_rows_with_a_target(shown):
    parts = shown(
        {"instruction": "Translate to French.", "input": "Hello", "output": "Bonjour"},
        {"instruction": "Say", "input": "", "output": "x " * 3000},
    )
    assert "2 rows with instruction, input, output" in parts["data"]
    assert parts["read as"].strip() == "prompt from 'instruction', target from 'output'"
    assert "1 prompts, for recipe=sft" in parts["used"]
    assert "1 of 2 examples are longer than the model's context of 2048" in parts["note"]
    assert "Bonjour" in parts["target"] and "«<|endoftext|>»" in parts["target"]
    assert "<|endoftext|>" in parts["ends"]


def test_rows_without_a_target(shown):
    parts = shown({"prompt": "Capital?", "reward_model": {"ground_truth": ["Paris", "Lutetia"]}})
    assert "target" not in parts and "for recipe=opd" in parts["used"]
    assert parts["answer"].strip() == "'Paris' or 'Lutetia'"


def test_forced_tokens_are_not_learned(shown):
    row = {
        "sentences": ["Tom has 2 pens.", "It rains."],
        "thoughts": ["2", "<skip>"],
        "question": "How many?",
        "final": "\\boxed{2}",
        "answer": "2",
    }
    parts = shown(row, model="stories-streaming", recipe="streaming_sft")
    assert "«<EOT>»" in parts["target"] and "«<skip>»" in parts["target"]
    assert "«<EOQ>»" not in parts["target"] and "<EOQ>" in parts["target"]


def test_generated_data(capsys):
    assert inspect.main(["data=stories", "model=stories-student", "data.stories=5"]) == 0
    assert "stories, generated: 5 rows" in capsys.readouterr().out


def test_bad_data_is_one_line(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"colour": "red"}\n')
    assert inspect.main([f"data={file}", "model=stories-student"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none of its columns is known to hold prompts" in error
