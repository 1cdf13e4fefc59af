"""The shapes that conversations and instructions come in, brought to turns with `role` and
`content` text.

TRL's and OpenAI's turns, ShareGPT's `conversations`, Alpaca's `instruction` and `input`, content in
text parts. What would be lost (tools, tool calls, images) is refused by name instead."""

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
LOST = ("tool_calls", "tool_call_id", "function_call")


def refuse_tools(row: dict[str, Any], where: str) -> None:
    """Raises DataError: the row has tools."""
    if row.get("tools"):
        raise DataError(
            f"{where}: it has 'tools', which training does not render; drop the column or the row"
        )


def instruction_text(row: dict[str, Any]) -> str | None:
    """Alpaca's `instruction`, with the `input` it is about where there is one."""
    instruction, given = row.get("instruction"), row.get("input")
    if isinstance(instruction, str) and isinstance(given, str) and given.strip():
        return f"{instruction.rstrip()}\n\n{given}"
    return instruction


def chat_turn(turn: Any, where: str, column: str) -> dict[str, str]:
    """A turn as role and content text; ShareGPT's have `from` and `value`.

    Raises:
        DataError: it is no such turn, or has more than text.
    """
    if isinstance(turn, dict) and "from" in turn and "role" not in turn:
        if turn["from"] not in SHAREGPT_ROLES:
            raise DataError(
                f"{where}: a turn of '{column}' is from {turn['from']!r}, not one of "
                f"{', '.join(SHAREGPT_ROLES)}; rename it, or drop the row"
            )
        turn = {"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")}
    if isinstance(turn, dict):
        for name in LOST:
            if turn.get(name):
                raise DataError(
                    f"{where}: a turn of '{column}' has '{name}', which training does not render; drop it, "
                    "or the row"
                )
        content = content_text(turn.get("content"))
        if isinstance(turn.get("role"), str) and content is not None:
            return {"role": turn["role"], "content": content}
    raise DataError(
        f"{where}: '{column}' is neither text nor a list of turns with role and content text"
    )


def content_text(content: Any) -> str | None:
    """Content as text: itself, or its parts of type `text` joined; None where it has anything
    else."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in content
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)
    return None


def target_text(value: Any, where: str, column: str) -> Any:
    """A supervised target that comes as turns, TRL's `completion`, as the assistant's text; any
    other value as it is.

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
        raise DataError(
            f"{where}: '{column}' must be one turn of the assistant, it is {roles}; put the others into "
            "the prompt"
        )
    return turns[0]["content"]
