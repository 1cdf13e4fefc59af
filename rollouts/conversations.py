"""The shapes that conversations and instructions come in, brought to turns with `role` and `content` text.

TRL's and OpenAI's turns, ShareGPT's `conversations`, Alpaca's `instruction` and `input`, content in text parts. What
would be lost (tools, tool calls, images) is refused by name instead.
"""
from __future__ import annotations

from typing import Any

from recipes.errors import DataError

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant",
                  "assistant": "assistant", "system": "system"}
LOST = ("tool_calls", "tool_call_id", "function_call")


def unify(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row whose ShareGPT conversation is in `messages`, and whose Alpaca input is in `instruction`.

    Raises:
        DataError: it has tools, or a conversation of another form.
    """
    if row.get("tools"):
        raise DataError(f"{where}: it has 'tools', which training does not render; drop the column or the row")
    if isinstance(row.get("conversations"), list) and "messages" not in row:
        row = {**row, "messages": [sharegpt_turn(turn, where) for turn in row["conversations"]]}
        del row["conversations"]
    given = row.get("input")
    if isinstance(row.get("instruction"), str) and isinstance(given, str) and given.strip():
        row = {**row, "instruction": f"{row['instruction'].rstrip()}\n\n{given}"}
    return row


def sharegpt_turn(turn: Any, where: str) -> dict[str, str]:
    """A turn {from, value} as one with a role and content."""
    if isinstance(turn, dict) and "role" in turn:
        return turn
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if speaker not in SHAREGPT_ROLES:
        raise DataError(f"{where}: a turn of 'conversations' is from {speaker!r}, not one of "
                        f"{', '.join(SHAREGPT_ROLES)}; rename it, or drop the row")
    return {"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}


def chat_turn(turn: Any, where: str, column: str) -> dict[str, str]:
    """A turn as role and content text.

    Raises:
        DataError: it is no such turn, or has more than text.
    """
    if isinstance(turn, dict):
        for name in LOST:
            if turn.get(name):
                raise DataError(f"{where}: a turn of '{column}' has '{name}', which training does not render; drop it, "
                                "or the row")
        content = content_text(turn.get("content"))
        if isinstance(turn.get("role"), str) and content is not None:
            return {"role": turn["role"], "content": content}
    raise DataError(f"{where}: '{column}' is neither text nor a list of turns with role and content text")


def content_text(content: Any) -> str | None:
    """Content as text: itself, or its parts of type `text` joined; None where it has anything else."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                 for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)
    return None


def target_text(value: Any, where: str, column: str) -> Any:
    """A supervised target that comes as turns, TRL's `completion`, as the assistant's text; any other value as it is.

    Raises:
        DataError: it is not one turn of the assistant, or a dictionary.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not any(isinstance(turn, dict) for turn in value):
        return value
    turns = [chat_turn(turn, where, column) for turn in value]
    if [turn["role"] for turn in turns] != ["assistant"]:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(f"{where}: '{column}' must be one turn of the assistant, it is {roles}; put the others into "
                        "the prompt")
    return turns[0]["content"]
