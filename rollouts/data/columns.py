"""Rows to examples: which column is what.

Columns that are not named are looked for in a fixed order, once per file:

- prompt: `prompt`, `messages`, `conversations`, `question`, `problem`, `instruction` (with the
  `input` that it is about), `input`; text, or a list of chat turns, of which a final one of the
  assistant is no part;
- answer: `reward_model.ground_truth`, `answer`, `final_answer`, `ground_truth`, `solution`;
- solution, the target of supervised training: that final assistant turn, else the worked text that
  the answer was taken from, else `solution`, `output`, `response`, `completion`, `chosen`; text, or
  one turn of the assistant.

An answer column may hold a worked text: `… #### 42` (GSM8K) gives the answer 42 and the solution
before it, and a `\\boxed{…}` the content of the last box. A list of answers is joined with commas.
A text to write that is named with `target_column`, as a translation is, becomes the answer and the
solution as it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from recipes.errors import DataError
from rewards.math import BOX, extract_boxed
from rollouts.data.conversations import chat_turn, instruction_text, refuse_tools, target_text
from rollouts.data.examples import Example, Message
from rollouts.data.frames import as_frames
from rollouts.data.readers import Row
from rollouts.data.squad import is_squad, squad
from rollouts.data.streaming_cot import is_segmented, segmented

PROMPT_COLUMNS = (
    "prompt",
    "messages",
    "conversations",
    "question",
    "problem",
    "instruction",
    "input",
)
ANSWER_COLUMNS = ("reward_model.ground_truth", "answer", "final_answer", "ground_truth", "solution")
SOLUTION_COLUMNS = ("solution", "output", "response", "completion", "chosen")


def row_examples(
    source: str,
    rows: list[tuple[str, Row]],
    prompt_column: str | None,
    answer_column: str | None,
    target_column: str | None,
    first_index: int,
) -> Iterator[Example]:
    if not rows:
        return
    columns = list(dict.fromkeys(name for _, row in rows for name in row))

    def first_of(names: Iterable[str]) -> str | None:
        return next(
            (name for name in names if any(_cell(row, name) is not None for _, row in rows)), None
        )

    named = {
        "prompt_column": prompt_column,
        "answer_column": answer_column,
        "target_column": target_column,
    }
    fields = (
        segmented
        if is_segmented(columns) and not (prompt_column or target_column)
        else squad
        if is_squad(rows[0][1]) and not any(named.values())
        else None
    )
    if fields is not None:
        for index, (place, row) in enumerate(rows, first_index):
            yield Example(index, **fields(row, f"{source} {place}"))
        return
    for key, column in named.items():
        if column is not None and first_of([column]) is None:
            raise DataError(
                f"{source}: no column '{column}' (data.{key}); its columns: {', '.join(columns)}"
            )
    prompt = prompt_column or first_of(PROMPT_COLUMNS)
    if prompt is None:
        raise DataError(
            f"{source}: none of its columns is known to hold prompts: {', '.join(columns)}; "
            "set data.prompt_column to the one that does"
        )
    answers = answer_column or first_of(ANSWER_COLUMNS)
    solutions = first_of(SOLUTION_COLUMNS)
    for index, (place, row) in enumerate(rows, first_index):
        frames = as_frames(_cell(row, prompt), source) if prompt_column else None
        refuse_tools(row, f"{source} {place}")
        asked = (
            instruction_text(row)
            if prompt == "instruction" and not prompt_column
            else _cell(row, prompt)
        )
        messages, target = _chat(
            "frames" if frames is not None else asked, f"{source} {place}", prompt
        )
        answer, worked = _answer(
            _cell(row, answers), is_text=answers == "solution" and answer_column is None
        )
        solution = (
            target
            or worked
            or _text(target_text(_cell(row, solutions), f"{source} {place}", solutions))
        )
        if answer is None:
            answer = _answer(solution, is_text=True)[0]
        if target_column is not None:
            answer = solution = (
                cell if isinstance(cell := _cell(row, target_column), str) else _text(cell)
            )
        yield Example(index, messages, answer, solution, frames=frames)


def _cell(row: Row, column: str | None) -> Any:
    """The value of a column, or of a dotted path into nested ones; None where there is none."""
    if column is None or column in row:
        return row.get(column)
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _chat(value: Any, where: str, column: str) -> tuple[list[Message], str | None]:
    """The turns up to the last one of the user, and the assistant's that followed it."""
    if value is None:
        raise DataError(f"{where}: no '{column}'; give every row a prompt, or drop the row")
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list):
        raise DataError(
            f"{where}: '{column}' is neither text nor a list of turns with role and content text"
        )
    turns = [chat_turn(turn, where, column) for turn in turns]
    target = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else None
    if not turns or not turns[-1]["content"].strip():
        raise DataError(f"{where}: '{column}' is empty; give every row a prompt, or drop the row")
    return turns, target


def _text(value: Any) -> str | None:
    """A cell as text: the first of several worked solutions, None for an empty one."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with a gap comes back as floats
    text = "" if value is None else str(value).strip()
    return text or None


def _answer(value: Any, is_text: bool) -> tuple[str | None, str | None]:
    """The answer in a cell, and the worked text it was taken from. `is_text`: no mark, no
    answer."""
    if isinstance(value, list) and not is_text:
        value = ", ".join(filter(None, map(_text, value)))
    text = _text(value)
    if text is None:
        return None, None
    if gsm8k := re.fullmatch(r"(.*)####\s*(\S[^\n]*)", text, re.DOTALL):
        return re.sub(r"(?<=\d),(?=\d{3})", "", gsm8k[2]), gsm8k[1].strip() or None
    if boxed := extract_boxed(text):
        only_a_box = re.fullmatch(rf"\$*{BOX}[^\n]*\}}\$*\.?", text)
        return boxed, None if only_a_box else text
    return (None, text) if is_text else (text, None)
