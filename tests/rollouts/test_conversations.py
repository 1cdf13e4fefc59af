"""Rows as people bring them: read right, or refused in one line that says what would be lost."""

import json

import pytest

from recipes.errors import DataError
from rollouts.data.load import load_examples

ASKED = [{"role": "user", "content": "2+2?"}]
ANSWERED = [{"role": "assistant", "content": "It is 4."}]


def load(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(path))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "completion": ANSWERED},
        {"prompt": ASKED, "completion": ANSWERED[0]},
        {"messages": ASKED + ANSWERED},
        {"prompt": ASKED, "chosen": ANSWERED, "rejected": [{"role": "assistant", "content": "5"}]},
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": "It is 4."},
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}],
                },
                *ANSWERED,
            ]
        },
        {"prompt": "2+2?", "completion": "It is 4."},
    ],
)
def test_one_conversation_in_many_forms(tmp_path, row):
    (example,) = load(tmp_path, row)
    assert example.messages == ASKED and example.solution == "It is 4."


def test_an_instruction_with_an_input(tmp_path):
    with_input, without = load(
        tmp_path,
        {"instruction": "Translate to French.", "input": "Hello", "output": "Bonjour"},
        {"instruction": "Say hello.", "input": "", "output": "Hello"},
    )
    assert (
        with_input.messages[0]["content"] == "Translate to French.\n\nHello"
        and with_input.solution == "Bonjour"
    )
    assert without.messages[0]["content"] == "Say hello."


def test_a_column_that_is_named_is_taken_as_it_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"instruction": "Say hello.", "input": "x", "conversations": ASKED + ANSWERED})
        + "\n"
    )
    assert (
        load_examples(str(path), prompt_column="instruction")[0].messages[0]["content"]
        == "Say hello."
    )
    assert load_examples(str(path), prompt_column="conversations")[0].messages == ASKED


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": ASKED + ANSWERED, "tools": [{"name": "add"}]}, "it has 'tools'"),
        (
            {
                "messages": [
                    *ASKED,
                    {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                ]
            },
            "'tool_calls'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "neither text nor",
        ),
        ({"prompt": "3+3?", "completion": ASKED + ANSWERED}, "it is user, assistant"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "from 'narrator'"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path, row, said):
    with pytest.raises(DataError, match=said) as caught:
        load(tmp_path, row)
    assert "line 1" in str(caught.value) and "\n" not in str(caught.value)
