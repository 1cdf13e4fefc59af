"""Rows to examples: which column holds what.

Columns that are not named are looked for in a fixed order, once per file:

- prompt: `prompt`, `messages`, `conversations`, `question`, `problem`, `instruction` (with the
  `input` that it is about), `input`. It is text or a list of chat turns. A final turn of the
  assistant is no part of the prompt.
- answer: `reward_model.ground_truth`, `answer`, `final_answer`, `ground_truth`, `solution`.
- solution, the target of supervised training: that final turn of the assistant. Else it is the
  worked text that the answer was taken from. Else it is `solution`, `output`, `response`,
  `completion` or `chosen`: text, or one turn of the assistant.

An answer column may hold a worked text. `… #### 42` (GSM8K) gives the answer 42 and the solution
before it. A `\\boxed{…}` gives the content of the last box. A list of answers is joined with
commas. The text in a `target_column`, as a translation is, becomes answer and solution as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from recipes.errors import DataError
from rewards.math import BOX, extract_boxed
from rollouts.data.conversations import chat_turn, instruction_text, refuse_tools, target_text
from rollouts.data.examples import Example, Message
from rollouts.data.frames import as_frames
from rollouts.data.readers import PlacedRow, Row
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

# A worked text that ends in its answer, as GSM8K's do.
GSM8K = re.compile(r"(?P<worked>.*)####\s*(?P<answer>\S[^\n]*)", re.DOTALL)
ONLY_A_BOX = re.compile(rf"\$*{BOX}[^\n]*\}}\$*\.?")
THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3})")


@dataclass(frozen=True)
class NamedColumns:
    """Columns that the user names, or dotted paths into them. None: found by their names."""

    prompt: str | None = None
    answer: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns of one file. None: the file has no such column."""

    prompt: str
    answer: str | None
    solution: str | None
    named: NamedColumns


def row_examples(
    source: str, rows: Sequence[PlacedRow], named: NamedColumns, first_index: int
) -> Iterator[Example]:
    """The examples of one file.

    Args:
        source: the file's name.
        rows: of the file, with their places.
        named: the columns that the user names.
        first_index: the index of the first example.

    Raises:
        DataError: a named column is missing, none is known to hold prompts, or a row cannot be
            used.
    """
    if not rows:
        return
    fields = _fields_reader(source, [row for _, row in rows], named)
    for index, (place, row) in enumerate(rows, first_index):
        yield Example(index, **fields(row, f"{source} {place}"))


def _fields_reader(
    source: str, rows: list[Row], named: NamedColumns
) -> Callable[[Row, str], dict[str, Any]]:
    """What turns a row and its place into the fields of an `Example`, all but the index."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if is_segmented(names) and not (named.prompt or named.target):
        return segmented
    if is_squad(rows[0]) and not (named.prompt or named.answer or named.target):
        return squad
    return partial(
        _table_fields, source=source, columns=_choose_columns(source, rows, names, named)
    )


def _choose_columns(source: str, rows: list[Row], names: list[str], named: NamedColumns) -> Columns:
    def first_of(columns: Iterable[str]) -> str | None:
        """The first column that has a value in any row."""
        filled = (
            column for column in columns if any(_cell(row, column) is not None for row in rows)
        )
        return next(filled, None)

    for part in ("prompt", "answer", "target"):
        column = getattr(named, part)
        if column is not None and first_of([column]) is None:
            raise DataError(
                f"{source}: no column '{column}' (data.{part}_column); "
                f"its columns: {', '.join(names)}"
            )
    prompt = named.prompt or first_of(PROMPT_COLUMNS)
    if prompt is None:
        raise DataError(
            f"{source}: none of its columns is known to hold prompts: {', '.join(names)}; "
            "set data.prompt_column to the one that does"
        )
    answer = named.answer or first_of(ANSWER_COLUMNS)
    return Columns(prompt, answer, first_of(SOLUTION_COLUMNS), named)


def _table_fields(row: Row, where: str, source: str, columns: Columns) -> dict[str, Any]:
    frames = as_frames(_cell(row, columns.prompt), source) if columns.named.prompt else None
    refuse_tools(row, where)
    # A source of frames has no text; the word stands in for one.
    prompt = _prompt(row, columns) if frames is None else "frames"
    messages, reply = _chat(prompt, where, columns.prompt)
    answer, solution = _answer_and_solution(row, where, columns, reply)
    if columns.named.target is not None:
        answer = solution = _verbatim(_cell(row, columns.named.target))
    return {"messages": messages, "answer": answer, "solution": solution, "frames": frames}


def _prompt(row: Row, columns: Columns) -> Any:
    if columns.prompt == "instruction" and not columns.named.prompt:
        return instruction_text(row)
    return _cell(row, columns.prompt)


def _answer_and_solution(
    row: Row, where: str, columns: Columns, reply: str | None
) -> tuple[str | None, str | None]:
    """`reply` is the final turn of the assistant, which comes before all other solutions."""
    # A column `solution` that nobody named as the answer is a worked text.
    is_text = columns.answer == "solution" and columns.named.answer is None
    answer, worked = _answer(_cell(row, columns.answer), is_text)
    solution = reply or worked
    if not solution:
        solution = _text(target_text(_cell(row, columns.solution), where, columns.solution))
    if answer is None:
        answer, _ = _answer(solution, is_text=True)
    return answer, solution


def _cell(row: Row, column: str | None) -> Any:
    """The value of a column, or of a dotted path into nested ones; None where there is none."""
    if column is None or column in row:
        return row.get(column)
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _chat(value: Any, where: str, column: str) -> tuple[list[Message], str | None]:
    """The turns up to the last one of the user, and the assistant's reply to it."""
    if value is None:
        raise DataError(f"{where}: no '{column}'; give every row a prompt, or drop the row")
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list):
        raise DataError(
            f"{where}: '{column}' is neither text nor a list of turns with role and content text"
        )
    turns = [chat_turn(turn, where, column) for turn in turns]
    reply = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else None
    if not turns or not turns[-1]["content"].strip():
        raise DataError(f"{where}: '{column}' is empty; give every row a prompt, or drop the row")
    return turns, reply


def _text(value: Any) -> str | None:
    """A cell as text: the first of several worked solutions, None for an empty one."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, float) and value.is_integer():
        # A column of integers with a gap comes back as floats.
        value = int(value)
    text = "" if value is None else str(value).strip()
    return text or None


def _verbatim(value: Any) -> str | None:
    return value if isinstance(value, str) else _text(value)


def _answer(value: Any, is_text: bool) -> tuple[str | None, str | None]:
    """The answer in a cell, and the worked text that it was taken from.

    Args:
        is_text: the cell is a worked text, which has no answer without a mark.
    """
    if isinstance(value, list) and not is_text:
        value = ", ".join(filter(None, map(_text, value)))
    text = _text(value)
    if text is None:
        return None, None
    if marked := GSM8K.fullmatch(text):
        return THOUSANDS_COMMA.sub("", marked["answer"]), marked["worked"].strip() or None
    if boxed := extract_boxed(text):
        return boxed, None if ONLY_A_BOX.fullmatch(text) else text
    return (None, text) if is_text else (text, None)
