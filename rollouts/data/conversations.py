"""The shapes that conversations and instructions come in, as turns with `role` and `content` text.

The shapes are TRL's and OpenAI's turns, ShareGPT's `conversations`, Alpaca's `instruction` and
`input`, and content in text parts. Tools, tool calls, images and separate reasoning would be lost:
they are refused by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from recipes.errors import DataError
from rollouts.data.cells import listed
from rollouts.data.examples import Message

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# Columns and parts of a turn that training does not render.
LOST_COLUMNS = ("tools", "images", "videos")
LOST_PARTS = (
    "tool_calls",
    "tool_call_id",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
)
# Columns that hold turns. A text in them, as in a CSV file, is the turns in JSON.
CHAT_COLUMNS = ("messages", "conversations")
# Columns with the text of a system turn.
SYSTEM_COLUMNS = ("system", "system_prompt")
# Columns with the text that a question is about.
CONTEXT_COLUMNS = ("context", "passage")


def refuse_lost(row: dict[str, Any], where: str) -> None:
    """Refuse a row that has tools, images or videos.

    Args:
        where: file and row, for errors.

    Raises:
        DataError: the row has them.
    """
    for name in LOST_COLUMNS:
        if row.get(name):
            raise DataError(
                f"{where}: it has '{name}', which training does not render; drop the column or "
                "the row"
            )


def instruction_text(row: dict[str, Any], where: str) -> Any:
    """Alpaca's `instruction`, followed by the `input` that it is about, where there is one.

    A value that is no text is returned as it is.

    Raises:
        DataError: the row has a `history` of earlier turns.
    """
    if row.get("history"):
        raise DataError(
            f"{where}: it has a 'history', which is not read; give the turns in 'messages'"
        )
    instruction = row.get("instruction")
    subject = row.get("input")
    if isinstance(instruction, str) and isinstance(subject, str) and subject.strip():
        return f"{instruction.rstrip()}\n\n{subject}"
    return instruction


def question_text(row: dict[str, Any], where: str) -> Any:
    """The `question`, after the `context` or `passage` that it is about, where there is one.

    A question that is no text is returned as it is.

    Raises:
        DataError: the context is no text.
    """
    question = row.get("question")
    for name in CONTEXT_COLUMNS:
        context = row.get(name)
        if not context or not isinstance(question, str):
            continue
        if not isinstance(context, str):
            raise DataError(
                f"{where}: '{name}' is no text; join it into the question, or leave it out with "
                "data.prompt_column=question"
            )
        if context.strip():
            return f"{context.rstrip()}\n\n{question}"
    return question


def with_system_column(
    row: dict[str, Any], messages: Sequence[Message], where: str
) -> list[Message]:
    """The messages after the system turn that a column of the row holds, where one does.

    Raises:
        DataError: the messages begin with another system turn.
    """
    texts = [row.get(name) for name in SYSTEM_COLUMNS]
    system = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    if system is None:
        return list(messages)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise DataError(
            f"{where}: the system turn of its chat differs from its column of a system turn; "
            "drop one of them"
        )
    return list(messages)


def chat_turns(value: Any, where: str, column: str) -> list[Message]:
    """A cell as turns. A text is one turn of the user.

    Args:
        where: file and row, for errors.
        column: of the cell.

    Raises:
        DataError: it is neither text nor turns.
    """
    if isinstance(value, str) and column in CHAT_COLUMNS:
        value = _turns_of_json(value, where, column)
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise _no_turns(where, column)
    return [chat_turn(turn, where, column) for turn in value]


def _turns_of_json(text: str, where: str, column: str) -> list:
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        turns = None
    if not isinstance(turns, list):
        raise DataError(
            f"{where}: '{column}' is a text that is no list of turns in JSON; write it as one, or "
            "name it 'prompt' if it is what the user says"
        )
    return turns


def _no_turns(where: str, column: str) -> DataError:
    return DataError(
        f"{where}: '{column}' is neither text nor a list of turns with role and content text"
    )


def chat_turn(turn: Any, where: str, column: str) -> Message:
    """A turn as role and content text.

    Args:
        turn: with `role` and `content`, or ShareGPT's with `from` and `value`.
        where: file and row, for errors.
        column: that holds the turns, for errors.

    Raises:
        DataError: it is no such turn, or has more than text.
    """
    if not isinstance(turn, dict):
        raise _no_turns(where, column)
    if "from" in turn and "role" not in turn:
        turn = _sharegpt_turn(turn, where, column)
    for name in LOST_PARTS:
        if turn.get(name):
            raise DataError(
                f"{where}: a turn of '{column}' has '{name}', which training does not render; "
                "drop it, or the row"
            )
    role = turn.get("role")
    content = content_text(turn.get("content"))
    if not isinstance(role, str) or content is None:
        raise _no_turns(where, column)
    return {"role": role, "content": content}


def _sharegpt_turn(turn: dict, where: str, column: str) -> dict[str, Any]:
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        shown = ascii(speaker)[:60] if isinstance(speaker, str) else type(speaker).__name__
        raise DataError(
            f"{where}: a turn of '{column}' is from {shown}, not one of "
            f"{', '.join(SHAREGPT_ROLES)}; rename it, or drop the row"
        )
    others = {name: turn.get(name) for name in LOST_PARTS}
    return others | {"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}


def content_text(content: Any) -> str | None:
    """Content as text: itself, or its parts of type `text` joined.

    Returns:
        None where the content has anything else.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts = [_part_text(part) for part in content]
    if not all(isinstance(text, str) for text in texts):
        return None
    return "".join(texts)


def _part_text(part: Any) -> Any:
    is_text = isinstance(part, dict) and part.get("type") == "text"
    return part.get("text") if is_text else None


def target_text(value: Any, messages: Sequence[Message], where: str, column: str) -> Any:
    """A supervised target: the assistant's text, where the target comes as turns.

    Args:
        value: turns, as TRL's `completion` and `chosen` have them: one of the assistant, or a whole
            conversation that begins with the prompt. Any other value is returned as it is.
        messages: the prompt.
        where: file and row, for errors.
        column: that holds the target, for errors.

    Raises:
        DataError: the turns are others, or one is malformed.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not any(isinstance(turn, dict) for turn in value):
        return value
    *earlier, last = [chat_turn(turn, where, column) for turn in value]
    if last["role"] != "assistant" or (earlier and earlier != list(messages)):
        roles = listed(turn["role"] for turn in (*earlier, last))
        raise DataError(
            f"{where}: '{column}' must be one turn of the assistant, or the prompt and that turn, "
            f"it is {roles}; put the others into the prompt"
        )
    return last["content"]
