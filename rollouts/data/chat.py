"""Examples to prompts: chat templates, system turns, and the limit of tokens."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from recipes.errors import ConfigError, DataError, one_line
from rollouts.data.examples import Example, Ids, Message, Prompt

# Stands for the source in a rendered chat: a symbol that no template writes.
PLACE = "\u241e"
# A text that shows which special tokens a tokenizer adds.
PROBE = "a"
# Texts that are tokenized in one call. A tokenizer's own records take 100 bytes a token and more.
CHUNK = 2048
# Each token id, once. An integer of its own for each token of a data set would take 32 bytes.
_SHARED: dict[int, int] = {}


def tokenize_prompts(
    examples: Iterable[Example],
    tokenizer,
    *,
    max_prompt_tokens: int,
    template: str = "auto",
    system: str | None = None,
    suffix: str | None = None,
    enable_thinking: bool = False,
    where: str = "data",
) -> tuple[list[Prompt], int]:
    """Prompts as token ids, ready for a completion to follow.

    Args:
        examples: their messages are rendered.
        tokenizer: a Hugging Face tokenizer.
        max_prompt_tokens: longer prompts are dropped, never cut.
        template: `chat`: the tokenizer's chat template. `plain`: the contents of the turns with a
            blank line between them, after the special tokens with which the tokenizer begins a
            text by itself. `auto`: chat where the tokenizer has a template.
        system: a system turn, in place of any that the example has.
        suffix: appended to the last turn as it is.
        enable_thinking: handed to the chat template.
        where: the data's name, for errors.

    Returns:
        The prompts that fit, in order, and the number of those dropped.

    Raises:
        ConfigError: `chat` without a chat template.
        DataError: the template refuses a chat, or not one prompt fits.
    """
    chat = uses_chat_template(tokenizer, template)

    def text_of(example: Example) -> str:
        messages = with_system(example.messages, system)
        messages[-1] = messages[-1] | {"content": messages[-1]["content"] + (suffix or "")}
        if not chat:
            return "\n\n".join(message["content"] for message in messages)
        try:
            return _render(tokenizer, messages, enable_thinking)
        # Templates raise errors of any kind.
        except Exception as error:
            raise DataError(
                f"{where}: example {example.index}: the chat template refuses it: "
                f"{one_line(error)}; change the row, or use data.template=plain"
            ) from error

    prompts = []
    with all_cores():
        for chunk in _chunks(examples):
            texts = [text_of(example) for example in chunk]
            # A chat template writes the special tokens itself.
            ids = _tokenize(tokenizer, texts, add_special_tokens=not chat)
            prompts += [
                Prompt(example.index, row, text, example)
                for example, row, text in zip(chunk, ids, texts)
            ]
    return drop_overlong(prompts, max_prompt_tokens, "prompts", where)


def _chunks(items: Iterable) -> Iterator[list]:
    items = iter(items)
    return iter(lambda: list(islice(items, CHUNK)), [])


def _tokenize(tokenizer, texts: list[str], add_special_tokens: bool) -> list[Ids]:
    """The ids of each text, with the special tokens that come before it.

    Special tokens after a text would stand between it and what follows. They are left out.
    """
    after = _special_tokens_after(tokenizer) if add_special_tokens else 0
    rows = tokenizer(texts, add_special_tokens=add_special_tokens).input_ids
    return [tuple(map(_SHARED.setdefault, row, row[: len(row) - after])) for row in rows]


def _special_tokens_after(tokenizer) -> int:
    """The number of special tokens that a tokenizer appends to each text."""
    bare = tokenizer(PROBE, add_special_tokens=False).input_ids
    whole = tokenizer(PROBE, add_special_tokens=True).input_ids
    for end in range(len(whole), len(bare) - 1, -1):
        if whole[end - len(bare) : end] == bare:
            return len(whole) - end
    return 0


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
    """The ids of each text. A text is tokenized once, however often it occurs.

    Args:
        add_special_tokens: put those before a text with which the tokenizer begins one.
    """
    ids: dict[str, Ids] = {}
    for chunk in _chunks(dict.fromkeys(texts)):
        ids.update(zip(chunk, _tokenize(tokenizer, chunk, add_special_tokens)))
    return ids


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
