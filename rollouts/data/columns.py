"""Rows to examples: which column holds what.

Columns that are not named are looked for in a fixed order, once per file:

- prompt: `prompt`, `messages`, `conversations`, `question` (after the `context` or `passage` that
  it is about), `problem`, `instruction` (with the `input` that it is about), `input`, `chosen`. It
  is text or a list of chat turns. A final turn of the assistant is no part of the prompt. A column
  `system` or `system_prompt` becomes the first turn.
- answer: `reward_model.ground_truth`, `answer`, `final_answer`, `ground_truth`, `solution`.
- solution, the target of supervised training: that final turn of the assistant. Else it is the
  worked text that the answer was taken from. Else it is `solution`, `output`, `response`,
  `completion` or `chosen`: text, or turns that end in one of the assistant. A text is kept as it
  is, white space included.

An answer column may hold a worked text. `… #### 42` (GSM8K) gives the answer 42 and the solution
before it. A `\\boxed{…}` gives the content of the last box. A list in a column `ground_truth`, and
an object with `target`, are answers of which any is right; elsewhere a list is one answer, joined
with commas. The text in a `target_column`, as a translation is, becomes answer and solution as it
is."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from recipes.errors import DataError
from rewards.math import BOX, extract_boxed, extract_marked
from rollouts.data.cells import cell, cell_text, listed, without_gaps
from rollouts.data.conversations import (
    chat_turns,
    instruction_text,
    question_text,
    refuse_lost,
    target_text,
    with_system_column,
)
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
    "chosen",
)
ANSWER_COLUMNS = ("reward_model.ground_truth", "answer", "final_answer", "ground_truth", "solution")
SOLUTION_COLUMNS = ("solution", "output", "response", "completion", "chosen")
# Columns whose text depends on other columns, unless the user names them.
JOINED_COLUMNS = {"instruction": instruction_text, "question": question_text}

ONLY_A_BOX = re.compile(rf"\$*{BOX}[^\n]*\}}\$*\.?")
THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3})")


@dataclass(frozen=True)
class NamedColumns:
    """Columns that the user names, or dotted paths into them. None: found by their names."""

    prompt: str | None = None
    answer: str | None = None
    target: str | None = None
    teacher: str | None = None
    # It says nothing of the form of a row.
    route: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Columns:
    """The columns of one file. None: the file has no such column."""

    prompt: str
    answer: str | None
    solution: str | None
    named: NamedColumns


def row_examples(
    source: str, rows: Iterable[PlacedRow], named: NamedColumns, first_index: int
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
    # The columns are chosen by all rows. Each row is let go when its example is made.
    waiting = deque((place, without_gaps(row)) for place, row in rows)
    if not waiting:
        return
    read = _fields_reader(source, [row for _, row in waiting], named)
    index = first_index
    while waiting:
        place, row = waiting.popleft()
        where = f"{source} {place}"
        fields = read(row, where)
        if named.route is not None and (name := cell(row, named.route)) is not None:
            fields["teacher"] = str(name)
        _check_characters(fields, where)
        yield Example(index, **fields)
        index += 1


def _check_characters(fields: dict[str, Any], where: str) -> None:
    """Refuse half a surrogate pair, which JSON can spell and no tokenizer takes."""
    for text in _texts(list(fields.values())):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            shown = ascii(text[max(0, error.start - 20) : error.end])
            raise DataError(
                f"{where}: its text has half a surrogate pair after {shown}; repair it, or drop "
                "the row"
            ) from error


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """The texts among values, and in their lists and messages."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from _texts(value.values())
        elif isinstance(value, list | tuple):
            yield from _texts(value)


def _fields_reader(
    source: str, rows: list[Row], named: NamedColumns
) -> Callable[[Row, str], dict[str, Any]]:
    """What turns a row and its place into the fields of an `Example`, all but the index."""
    for key, column in (("prompt_column", named.teacher), ("route", named.route)):
        if column is not None and all(cell(row, column) is None for row in rows):
            raise DataError(
                f"{source}: no column '{column}' (teacher.{key}); its columns: "
                f"{listed(dict.fromkeys(name for row in rows for name in row))}"
            )
    if not any((named.prompt, named.target, named.teacher)) and any(map(is_segmented, rows)):
        return segmented
    if named == NamedColumns() and any(map(is_squad, rows)):
        return squad
    return partial(_table_fields, source=source, columns=_choose_columns(source, rows, named))


def form_of(source: str, rows: Iterable[Row], named: NamedColumns) -> str:
    """How the rows of a file are read, in words.

    Args:
        source: the file's name.
        rows: of the file.
        named: the columns that the user names.

    Raises:
        DataError: as `row_examples`.
    """
    filled = [without_gaps(row) for row in rows]
    if not filled:
        return "no rows"
    read = _fields_reader(source, filled, named)
    if read is segmented:
        return "a text in sentences, a question and, for training, thoughts"
    if read is squad:
        return "SQuAD: context, question and answers"
    columns = read.keywords["columns"]
    parts = [f"prompt from '{columns.prompt}'"]
    if columns.answer is not None:
        parts.append(f"answer from '{columns.answer}'")
    target = named.target or columns.solution
    if target is not None:
        parts.append(f"target from '{target}'")
    return ", ".join(parts)


def _choose_columns(source: str, rows: list[Row], named: NamedColumns) -> Columns:
    def first_of(columns: Iterable[str]) -> str | None:
        """The first column that has a value in any row."""
        filled = (
            column for column in columns if any(cell(row, column) is not None for row in rows)
        )
        return next(filled, None)

    def names() -> str:
        return listed(dict.fromkeys(name for row in rows for name in row))

    for part in ("prompt", "answer", "target"):
        column = getattr(named, part)
        if column is not None and first_of([column]) is None:
            raise DataError(
                f"{source}: no column '{column}' (data.{part}_column); its columns: {names()}"
            )
    prompt = named.prompt or first_of(PROMPT_COLUMNS)
    if prompt is None:
        lacking = next((name for name in PROMPT_COLUMNS if any(name in row for row in rows)), None)
        if lacking is not None:
            raise DataError(
                f"{source}: no row has a value in '{lacking}'; fill it, or set data.prompt_column"
            )
        raise DataError(
            f"{source}: none of its columns is known to hold prompts: {names()}; "
            "set data.prompt_column to the one that does"
        )
    answer = named.answer or first_of(ANSWER_COLUMNS)
    return Columns(prompt, answer, first_of(SOLUTION_COLUMNS), named)


def _table_fields(row: Row, where: str, source: str, columns: Columns) -> dict[str, Any]:
    named = columns.named
    frames = as_frames(cell(row, columns.prompt), source, where) if named.prompt else None
    refuse_lost(row, where)
    # A source of frames has no text; the word stands in for one.
    prompt = _prompt(row, where, columns) if frames is None else "frames"
    messages, reply = _chat(prompt, where, columns.prompt)
    if not named.prompt:
        messages = with_system_column(row, messages, where)
    fields: dict[str, Any] = {"messages": messages, "frames": frames}
    if named.teacher is not None:
        fields["teacher_messages"], _ = _chat(cell(row, named.teacher), where, named.teacher)
    if named.target is not None:
        target = _target(row, where, named.target, messages)
        return fields | {"answer": target, "solution": target}
    answers, solution = _answers_and_solution(row, where, columns, messages, reply)
    return fields | {
        "answer": answers[0] if answers else None,
        "references": answers if len(answers) > 1 else None,
        "solution": solution,
    }


def _prompt(row: Row, where: str, columns: Columns) -> Any:
    value = cell(row, columns.prompt)
    if columns.named.prompt:
        return value
    if columns.prompt == "chosen" and isinstance(value, str):
        raise DataError(
            f"{where}: 'chosen' is text and there is no column 'prompt', so the prompt cannot be "
            "told from it; give it in a column of its own"
        )
    if join := JOINED_COLUMNS.get(columns.prompt):
        return join(row, where)
    return value


def _chat(value: Any, where: str, column: str) -> tuple[list[Message], str | None]:
    """The turns up to the last one of the user, and the assistant's reply to it."""
    if value is None:
        raise DataError(f"{where}: no '{column}'; give every row a prompt, or drop the row")
    turns = chat_turns(value, where, column)
    reply = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else None
    if not turns or not turns[-1]["content"].strip():
        raise DataError(f"{where}: '{column}' is empty; give every row a prompt, or drop the row")
    if turns[-1]["role"] != "user":
        role = listed([turns[-1]["role"]])
        raise DataError(
            f"{where}: the last turn of '{column}' before the reply is of '{role}', not of 'user'; "
            "put the user's turn last, or drop the row"
        )
    return turns, reply


def _answers_and_solution(
    row: Row, where: str, columns: Columns, messages: list[Message], reply: str | None
) -> tuple[tuple[str, ...], str | None]:
    """The answers of which any is right, and the target.

    Args:
        reply: the final turn of the assistant, which comes before all other solutions.
    """
    if columns.answer == "solution" and columns.named.answer is None:
        # Nobody named it as the answer: it is a worked text.
        answers, worked = _answer(_target(row, where, "solution", messages), is_text=True)
    else:
        answers, worked = _answers(cell(row, columns.answer), where, columns.answer)
    solution = reply if reply and reply.strip() else worked
    if solution is None and not _is_labelled_wrong(row, columns.solution):
        solution = _target(row, where, columns.solution, messages)
        solution = solution if solution and solution.strip() else None
    if not answers:
        answers, _ = _answer(solution, is_text=True)
    return answers, solution


def _is_labelled_wrong(row: Row, column: str | None) -> bool:
    """Whether the row is TRL's unpaired preference for a completion that is not to be learned."""
    return column == "completion" and row.get("label") is False


def _target(row: Row, where: str, column: str | None, messages: list[Message]) -> str | None:
    """The text to write, as it is: the first of several."""
    if column is None:
        return None
    value = target_text(cell(row, column), messages, where, column)
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str) else cell_text(value, where, column)


def _answers(value: Any, where: str, column: str | None) -> tuple[tuple[str, ...], str | None]:
    """The right answers in a cell, and the worked text that one was taken from."""
    if column is None or value is None:
        return (), None
    any_is_right = column.split(".")[-1] == "ground_truth"
    if isinstance(value, dict) and "target" in value:
        value, any_is_right = value["target"], True
    if not isinstance(value, list):
        return _answer(cell_text(value, where, column))
    texts = [text for text in (cell_text(part, where, column) for part in value) if text]
    if not any_is_right:
        return _answer(", ".join(texts))
    answers = [answer for text in texts for answer in _answer(text)[0]]
    return tuple(dict.fromkeys(answers)), None


def _answer(text: str | None, is_text: bool = False) -> tuple[tuple[str, ...], str | None]:
    """The answer that a text is or ends in, and the text where it is more than the answer.

    Args:
        is_text: it is a worked text, which has no answer without a mark.
    """
    if text is None or not text.strip():
        return (), None
    if (marked := extract_marked(text)) and marked[1]:
        worked, answer = marked
        return (THOUSANDS_COMMA.sub("", answer),), worked or None
    if boxed := extract_boxed(text):
        return (boxed,), None if ONLY_A_BOX.fullmatch(text.strip()) else text
    return ((), text) if is_text else ((text,), None)
