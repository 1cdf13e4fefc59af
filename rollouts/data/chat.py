"""Examples to prompts: chat templates, system turns, and the limit of tokens."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence

from recipes.errors import ConfigError, DataError
from rollouts.data.examples import Example, Prompt
from rollouts.data.readers import one_line

PLACE = "\u241e"  # stands for the source in a rendered chat; a symbol that no template writes


def tokenize_prompts(
    examples: Iterable[Example],
    tokenizer,
    *,
    max_prompt_tokens: int,
    template: str = "auto",
    system: str | None = None,
    suffix: str | None = None,
    enable_thinking: bool = False,
) -> tuple[list[Prompt], int]:
    """Prompts as token ids, ready for a completion to follow.

    Args:
        examples: their messages are rendered.
        tokenizer: a Hugging Face tokenizer.
        max_prompt_tokens: longer prompts are dropped, never cut.
        template: `chat`: the tokenizer's chat template; `plain`: the contents of the turns with a
            blank line between them, and the special tokens that the tokenizer adds by itself;
            `auto`: chat where the tokenizer has a template.
        system: a system turn, in place of any the example has.
        suffix: appended to the last turn as it is.
        enable_thinking: handed to the chat template.

    Returns:
        The prompts that fit, in order, and the number of those dropped.

    Raises:
        ConfigError: `chat` without a chat template.
        DataError: the template refuses a chat, or not one prompt fits.
    """
    examples = list(examples)
    if template == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            f"data.template=chat: the tokenizer of {tokenizer.name_or_path} has no chat "
            "template; use data.template=plain"
        )
    chat = template == "chat" or (template == "auto" and bool(tokenizer.chat_template))
    texts = []
    for example in examples:
        messages = [dict(message) for message in example.messages]
        if system is not None:
            messages = [message for message in messages if message["role"] != "system"]
            messages.insert(0, {"role": "system", "content": system})
        messages[-1]["content"] += suffix or ""
        if not chat:
            texts.append("\n\n".join(message["content"] for message in messages))
            continue
        try:
            texts.append(
                tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=enable_thinking,
                )
            )
        except Exception as error:  # templates raise what they like
            reason = one_line(error)
            raise DataError(
                f"example {example.index}: the chat template refuses it: {reason}"
            ) from error
    # A chat template writes the special tokens itself.
    with all_cores():
        ids = tokenizer(texts, add_special_tokens=not chat)["input_ids"] if texts else []
    kept = [
        Prompt(example.index, tuple(row), text, example)
        for example, row, text in zip(examples, ids, texts)
        if len(row) <= max_prompt_tokens
    ]
    if examples and not kept:
        raise DataError(
            f"all {len(examples)} prompts are longer than {max_prompt_tokens} tokens, the "
            f"shortest has {min(map(len, ids))}; raise data.max_prompt_tokens"
        )
    return kept, len(examples) - len(kept)


@contextlib.contextmanager
def all_cores():
    """Let the tokenizer use all cores. Elsewhere it uses one, as it may not after its process was
    forked."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def chat_frame(tokenizer, data, turns: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """What the chat template writes before and after the text of the user's last turn.

    Raises:
        DataError: the template refuses the turns, or changes the text.
    """
    messages = [{"role": role, "content": content} for role, content in (*turns, ("user", PLACE))]
    try:
        rendered = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=data.enable_thinking,
        )
    except Exception as error:  # templates raise what they like
        raise DataError(
            f"the chat template refuses a chat of {', '.join(m['role'] for m in messages)}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    before, found, after = rendered.partition(PLACE)
    if not found:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} does not keep the user's text as it is; use "
            "data.template=plain"
        )
    return before, after
