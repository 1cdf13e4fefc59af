"""Examples to prompts: chat templates, system turns, and the limit of tokens."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence

from recipes.errors import ConfigError, DataError, one_line
from rollouts.data.examples import Example, Ids, Message, Prompt

# Stands for the source in a rendered chat: a symbol that no template writes.
PLACE = "\u241e"


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
        template: `chat`: the tokenizer's chat template. `plain`: the contents of the turns with a
            blank line between them, and the special tokens that the tokenizer adds by itself.
            `auto`: chat where the tokenizer has a template.
        system: a system turn, in place of any that the example has.
        suffix: appended to the last turn as it is.
        enable_thinking: handed to the chat template.

    Returns:
        The prompts that fit, in order, and the number of those dropped.

    Raises:
        ConfigError: `chat` without a chat template.
        DataError: the template refuses a chat, or not one prompt fits.
    """
    examples = list(examples)
    chat = uses_chat_template(tokenizer, template)
    texts = []
    for example in examples:
        messages = with_system(example.messages, system)
        messages[-1] = messages[-1] | {"content": messages[-1]["content"] + (suffix or "")}
        if not chat:
            texts.append("\n\n".join(message["content"] for message in messages))
            continue
        try:
            texts.append(_render(tokenizer, messages, enable_thinking))
        # Templates raise errors of any kind.
        except Exception as error:
            raise DataError(
                f"example {example.index}: the chat template refuses it: {one_line(error)}"
            ) from error
    with all_cores():
        # A chat template writes the special tokens itself.
        ids = tokenizer(texts, add_special_tokens=not chat)["input_ids"] if texts else []
    prompts = [
        Prompt(example.index, tuple(row), text, example)
        for example, row, text in zip(examples, ids, texts)
    ]
    return drop_overlong(prompts, max_prompt_tokens, "prompts")


def uses_chat_template(tokenizer, template: str) -> bool:
    """Whether prompts are rendered by the tokenizer's chat template.

    Args:
        template: `data.template`: `chat`, `plain` or `auto`.

    Raises:
        ConfigError: `chat` without a chat template.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            f"data.template=chat: the tokenizer of {tokenizer.name_or_path} has no chat template; "
            "use data.template=plain"
        )
    return template != "plain" and bool(tokenizer.chat_template)


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """A copy of the messages that begins with this system turn, in place of any they have.

    None keeps them as they are.
    """
    if system is None:
        return list(messages)
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": system}, *others]


def drop_overlong(
    prompts: Sequence[Prompt], limit: int, noun: str, where: str | None = None
) -> tuple[list[Prompt], int]:
    """The prompts of at most `limit` tokens, in order, and the number of the others.

    Args:
        noun: what the error calls the prompts.
        where: the data's name, for errors.

    Raises:
        DataError: there are prompts, and not one fits.
    """
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= limit]
    if prompts and not fitting:
        place = "" if where is None else f"{where}: "
        shortest = min(len(prompt.token_ids) for prompt in prompts)
        raise DataError(
            f"{place}all {len(prompts)} {noun} are longer than {limit} tokens, the shortest has "
            f"{shortest}; raise data.max_prompt_tokens"
        )
    return fitting, len(prompts) - len(fitting)


def text_ids(tokenizer, texts: Iterable[str], add_special_tokens: bool = False) -> dict[str, Ids]:
    """The ids of each text. A text is tokenized once, however often it occurs."""
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    ids = tokenizer(distinct, add_special_tokens=add_special_tokens).input_ids
    return dict(zip(distinct, map(tuple, ids)))


class SourceFrame:
    """What stands around a source that is read bit by bit.

    Before it are the earlier turns of the chat, the template's words, the instruction and
    `data.suffix`. After it is what the template writes up to the answer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        data: the section `data` of a config.
        instruction: comes last before `data.suffix` and the source.

    Raises:
        ConfigError: `data.template=chat` without a chat template.
    """

    def __init__(self, tokenizer, data, instruction: str):
        self.tokenizer = tokenizer
        self.instruction = instruction + (data.suffix or "")
        # Whether the chat template is used; it writes the special tokens itself.
        self.chat = uses_chat_template(tokenizer, data.template)
        self.system = data.system
        self.enable_thinking = data.enable_thinking
        # Many examples have the same earlier turns, most of them none.
        self._known: dict[tuple[tuple[str, str], ...], tuple[str, str]] = {}

    def around(self, example: Example) -> tuple[str, str]:
        """The texts before and after the source of an example, its last message.

        Raises:
            DataError: the chat template refuses the turns, or changes the source.
        """
        messages = with_system(example.messages[:-1], self.system)
        turns = tuple((message["role"], message["content"]) for message in messages)
        if turns not in self._known:
            before, after = self._surroundings(turns)
            self._known[turns] = before + self.instruction, after
        return self._known[turns]

    def _surroundings(self, turns: tuple[tuple[str, str], ...]) -> tuple[str, str]:
        if self.chat:
            return chat_frame(self.tokenizer, turns, self.enable_thinking)
        return "".join(f"{text}\n\n" for _, text in turns), ""


def chat_frame(
    tokenizer, turns: Sequence[tuple[str, str]], enable_thinking: bool
) -> tuple[str, str]:
    """What the chat template writes before and after the text of the user's last turn.

    Args:
        turns: role and text of the turns before it.
        enable_thinking: handed to the chat template.

    Raises:
        DataError: the template refuses the turns, or changes the text.
    """
    messages = [{"role": role, "content": text} for role, text in (*turns, ("user", PLACE))]
    try:
        rendered = _render(tokenizer, messages, enable_thinking)
    # Templates raise errors of any kind.
    except Exception as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template refuses a chat of {roles}: {one_line(error)}"
        ) from error
    before, place, after = rendered.partition(PLACE)
    if not place:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} does not keep the user's text as it "
            "is; use data.template=plain"
        )
    return before, after


def _render(tokenizer, messages: list[Message], enable_thinking: bool) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
    )


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Let the tokenizer use all cores.

    Elsewhere it uses one, since a process that forks must not hold its threads.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
