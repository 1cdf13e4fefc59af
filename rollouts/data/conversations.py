"""The shapes that conversations and instructions come in, as turns with `role` and `content` text.

The shapes are TRL's and OpenAI's turns, ShareGPT's `conversations`, Alpaca's `instruction` and
`input`, and content in text parts. Tools, tool calls and images would be lost: they are refused by
name."""

from __future__ import annotations

from typing import Any

from recipes.errors import DataError

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# Parts of a turn that training does not render.
TOOL_PARTS = ("tool_calls", "tool_call_id", "function_call")


def refuse_tools(row: dict[str, Any], where: str) -> None:
    """Refuse a row that has tools.

    Args:
        where: file and row, for errors.

    Raises:
        DataError: the row has tools.
    """
    if row.get("tools"):
        raise DataError(
            f"{where}: it has 'tools', which training does not render; drop the column or the row"
        )


def instruction_text(row: dict[str, Any]) -> Any:
    """Alpaca's `instruction`, followed by the `input` that it is about, where there is one.

    A value that is no text is returned as it is.
    """
    instruction = row.get("instruction")
    subject = row.get("input")
    if isinstance(instruction, str) and isinstance(subject, str) and subject.strip():
        return f"{instruction.rstrip()}\n\n{subject}"
    return instruction


def chat_turn(turn: Any, where: str, column: str) -> dict[str, str]:
    """A turn as role and content text.

    Args:
        turn: with `role` and `content`, or ShareGPT's with `from` and `value`.
        where: file and row, for errors.
        column: that holds the turns, for errors.

    Raises:
        DataError: it is no such turn, or has more than text.
    """
    if isinstance(turn, dict):
        if "from" in turn and "role" not in turn:
            turn = _sharegpt_turn(turn, where, column)
        for name in TOOL_PARTS:
            if turn.get(name):
                raise DataError(
                    f"{where}: a turn of '{column}' has '{name}', which training does not render; "
                    "drop it, or the row"
                )
        role = turn.get("role")
        content = content_text(turn.get("content"))
        if isinstance(role, str) and content is not None:
            return {"role": role, "content": content}
    raise DataError(
        f"{where}: '{column}' is neither text nor a list of turns with role and content text"
    )


def _sharegpt_turn(turn: dict, where: str, column: str) -> dict[str, Any]:
    speaker = turn["from"]
    if speaker not in SHAREGPT_ROLES:
        raise DataError(
            f"{where}: a turn of '{column}' is from {speaker!r}, not one of "
            f"{', '.join(SHAREGPT_ROLES)}; rename it, or drop the row"
        )
    return {"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}


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


def target_text(value: Any, where: str, column: str) -> Any:
    """A supervised target: the assistant's text, where the target comes as turns.

    Args:
        value: turns, as TRL's `completion` has them. Any other value is returned as it is.
        where: file and row, for errors.
        column: that holds the target, for errors.

    Raises:
        DataError: the turns are not one turn of the assistant, or one is malformed.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not any(isinstance(turn, dict) for turn in value):
        return value
    turns = [chat_turn(turn, where, column) for turn in value]
    roles = [turn["role"] for turn in turns]
    if roles != ["assistant"]:
        raise DataError(
            f"{where}: '{column}' must be one turn of the assistant, it is {', '.join(roles)}; "
            "put the others into the prompt"
        )
    return turns[0]["content"]
