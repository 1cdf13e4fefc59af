"""Prompts of a model that reads a source unit by unit and writes in between.

A source is read in words or sentences, and a target is written in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain

from recipes.errors import ConfigError, DataError, ModelError
from rollouts.data.chat import chat_frame
from rollouts.data.examples import Example, Ids, Prompt
from rollouts.data.sentences import split_sentences
from rollouts.simultaneous.frames import frame_units, load_encoder

UNITS = {"word": str.split, "sentence": split_sentences}  # values of streaming.unit


def unit_prompts(
    examples: Sequence[Example], tokenizer, config, where: str
) -> tuple[list[Prompt], int]:
    """Prompts for a model that reads a source unit by unit and writes in between.

    A prompt's `segments` are (frame, unit 1, …, unit M); its `opening` is one part. The frame is
    what the chat template writes before the text, then `streaming.instruction`, `data.suffix` and,
    where an example has a context, its question on a line; with nothing to write, the token for the
    beginning or else the end of a text. Units of a source are its words or its sentences
    (`streaming.unit`), each with a space before it but the first, so that the joined ids spell the
    source with single spaces. The last unit ends with the end token, which is our choice: a model
    that cannot tell that the input is over cannot tell when to stop waiting. The opening, where no
    template writes one, is the end token too.

    Args:
        examples: those of a chat keep its earlier turns; `context`, or else the last one, is the
            source.
        tokenizer: a Hugging Face tokenizer.
        config: of the run; its sections `data` and `streaming` are read.
        where: the data's name, for errors.

    Returns:
        The prompts of at most `data.max_prompt_tokens` tokens, in order, and the number of those
        dropped.

    Raises:
        DataError: a source or a target is empty, or not one prompt fits.
        ConfigError: `data.template=chat` without a chat template.
        ModelError: the tokenizer has no end token, or puts spaces before words by itself.
    """
    data, end = config.data, _end(tokenizer)
    joined = tokenizer.decode(list(chain(*_coded(tokenizer, ("a", " b")).values())))
    if joined != "a b":
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} joins 'a' and ' b' to '{joined}', so a text "
            "cannot be cut into words; use a model with a byte-level tokenizer"
        )
    if data.template == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            f"data.template=chat: the tokenizer of {tokenizer.name_or_path} has no chat template; use "
            "data.template=plain"
        )
    chat = data.template != "plain" and bool(tokenizer.chat_template)

    @cache
    def around(turns: tuple[tuple[str, str], ...]) -> tuple[str, str]:
        """What is written before and after the text."""
        before, after = (
            chat_frame(tokenizer, data, turns)
            if chat
            else ("\n\n".join([t for _, t in turns] + [""]), "")
        )
        return before + config.streaming.instruction + (data.suffix or ""), after

    # once: OmegaConf is slow
    system, cut, longest = data.system, UNITS[config.streaming.unit], data.max_prompt_tokens
    examples = list(examples)
    frames, afters, sources = [], [], []
    for example in examples:
        turns = [(turn["role"], turn["content"]) for turn in example.messages[:-1]]
        if system is not None:
            turns = [("system", system)] + [turn for turn in turns if turn[0] != "system"]
        before, after = around(tuple(turns))
        source = example.messages[-1]["content"] if example.context is None else example.context
        for name, text in (("source", source), ("target", example.solution)):
            if text is not None and not text.strip():
                raise DataError(
                    f"{where}: row {example.index} has an empty {name}; fill it, or drop the row"
                )
        spoken = example.frames is not None
        asked = example.question is not None and example.context is not None
        frames.append(f"{before}{example.question}\n" if asked else before)
        afters.append(after)
        sources.append([] if spoken else _spaced(cut(source)))
    marks = _coded(tokenizer, frames, add_special_tokens=not chat)
    units, closings = _coded(tokenizer, chain(*sources)), _coded(tokenizer, afters)
    first = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    prompts = []
    for example, frame, after, source in zip(examples, frames, afters, sources):
        heard = () if example.frames is None else _heard(example, config, where)
        segments = [marks[frame] or (first,), *(units[unit] for unit in source), *heard]
        segments[-1] += (end,)
        head = frame if marks[frame] else tokenizer.convert_ids_to_tokens(first)
        prompts.append(
            Prompt(
                example.index,
                tuple(chain(*segments)),
                "".join((head, *source, tokenizer.eos_token)),
                example,
                tuple(segments),
                (closings[after] or (end,),),
            )
        )
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= longest]
    if prompts and not kept:
        raise DataError(
            f"{where}: all {len(prompts)} sources are longer than {longest} tokens, the "
            f"shortest has {min(len(p.token_ids) for p in prompts)}; raise data.max_prompt_tokens"
        )
    return kept, len(prompts) - len(kept)


def _heard(example: Example, config, where: str) -> list[Ids]:
    if config.model.encoder is None:
        raise ConfigError(
            f"{where}: row {example.index} is read as frames; name what encodes them with model.encoder"
        )
    return frame_units(
        example.frames,
        load_encoder(config.model.encoder),
        config.streaming.unit_seconds,
        f"{where}: row {example.index}",
    )


def target_words(text: str, tokenizer) -> list[Ids]:
    """The ids of each word of a target, with the space before it for all but the first, then the
    end token by itself.

    Raises:
        ModelError: the tokenizer has no end token.
    """
    end, words = _end(tokenizer), _spaced(text.split())
    ids = tokenizer(words, add_special_tokens=False).input_ids if words else []
    return [*map(tuple, ids), (end,)]


def _spaced(units: list[str]) -> list[str]:
    return [*units[:1], *(f" {unit}" for unit in units[1:])]


def _coded(tokenizer, texts: Iterable[str], add_special_tokens: bool = False) -> dict[str, Ids]:
    """The ids of each text, tokenized once however often it occurs."""
    distinct = list(dict.fromkeys(texts))
    ids = tokenizer(distinct, add_special_tokens=add_special_tokens).input_ids if distinct else []
    return dict(zip(distinct, map(tuple, ids)))


def _end(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no end token (eos_token), which marks the end "
            "of what is read; give it one"
        )
    return tokenizer.eos_token_id
