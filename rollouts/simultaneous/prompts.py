"""Prompts of a model that reads a source unit by unit and writes in between.

A source is read in words, in sentences, or in seconds of speech. A target is written in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from recipes.errors import ConfigError, DataError, ModelError
from rollouts.data.chat import SourceFrame, drop_overlong, text_ids
from rollouts.data.examples import Example, Ids, Prompt
from rollouts.data.sentences import split_sentences
from rollouts.simultaneous.frames import frame_units, load_encoder

# The values of `streaming.unit`.
UNITS = {"word": str.split, "sentence": split_sentences}


@dataclass(frozen=True)
class _Source:
    """The texts of one prompt."""

    # Before the units: the frame, as `unit_prompts` has it.
    before: str
    # Of a source of frames there are none.
    units: list[str]
    # After the units, up to the answer.
    after: str


def unit_prompts(
    examples: Sequence[Example], tokenizer, config, where: str
) -> tuple[list[Prompt], int]:
    """Prompts for a model that reads a source unit by unit and writes in between.

    A prompt's `segments` are (frame, unit 1, …, unit M), and its `opening` is one part.

    - The frame is what the chat template writes before the text, then `streaming.instruction` and
      `data.suffix`. Where an example has a context, its question follows on a line. An empty frame
      becomes the token for the beginning of a text, or else for its end.
    - A unit is a word or a sentence (`streaming.unit`), with a space before it for all but the
      first. So the joined ids spell the source with single spaces.
    - The last unit ends with the end token, which is our choice: a model that cannot tell that the
      input is over cannot tell when to stop waiting.
    - The opening is what the chat template writes after the text, or else the end token.

    Args:
        examples: those of a chat keep its earlier turns. The source is `context`, or else the last
            turn.
        tokenizer: a Hugging Face tokenizer.
        config: of the run; its sections `data` and `streaming` are read, and `model.encoder` for
            sources of frames.
        where: the data's name, for errors.

    Returns:
        The prompts of at most `data.max_prompt_tokens` tokens, in order, and the number of those
        dropped.

    Raises:
        DataError: a source or a target is empty, or not one prompt fits.
        ConfigError: `data.template=chat` without a chat template, or frames without an encoder.
        ModelError: the tokenizer has no end token, or puts spaces before words by itself.
    """
    end = _end(tokenizer)
    _check_spaces(tokenizer)
    frame = SourceFrame(tokenizer, config.data, config.streaming.instruction)
    cut = UNITS[config.streaming.unit]
    examples = list(examples)
    sources = [_source(example, frame, cut, where) for example in examples]
    befores = text_ids(
        tokenizer, (source.before for source in sources), add_special_tokens=not frame.chat
    )
    afters = text_ids(tokenizer, (source.after for source in sources))
    units = text_ids(tokenizer, chain.from_iterable(source.units for source in sources))
    beginning = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    prompts = []
    for example, source in zip(examples, sources):
        segments = [befores[source.before] or (beginning,)]
        segments += [units[unit] for unit in source.units]
        segments += _spoken_units(example, config, where)
        segments[-1] += (end,)
        opening = (afters[source.after] or (end,),)
        before = source.before
        if not befores[before]:
            before = tokenizer.convert_ids_to_tokens(beginning)
        text = "".join((before, *source.units, tokenizer.eos_token))
        token_ids = tuple(chain(*segments))
        prompts.append(Prompt(example.index, token_ids, text, example, tuple(segments), opening))
    return drop_overlong(prompts, config.data.max_prompt_tokens, "sources", where)


def target_words(text: str, tokenizer) -> list[Ids]:
    """The ids of each word of a target, then the end token by itself.

    All words but the first have the space before them.

    Raises:
        ModelError: the tokenizer has no end token.
    """
    end = _end(tokenizer)
    words = _spaced(text.split())
    ids = text_ids(tokenizer, words)
    return [*(ids[word] for word in words), (end,)]


def _source(
    example: Example, frame: SourceFrame, cut: Callable[[str], list[str]], where: str
) -> _Source:
    before, after = frame.around(example)
    has_context = example.context is not None
    text = example.context if has_context else example.messages[-1]["content"]
    _check_text("source", text, example, where)
    _check_text("target", example.solution, example, where)
    if has_context and example.question is not None:
        before = f"{before}{example.question}\n"
    units = [] if example.frames is not None else _spaced(cut(text))
    return _Source(before, units, after)


def _check_text(name: str, text: str | None, example: Example, where: str) -> None:
    if text is not None and not text.strip():
        raise DataError(
            f"{where}: row {example.index} has an empty {name}; fill it, or drop the row"
        )


def _spoken_units(example: Example, config, where: str) -> list[Ids]:
    """The units of a source of frames; none where the source is text."""
    if example.frames is None:
        return []
    row = f"{where}: row {example.index}"
    if config.model.encoder is None:
        raise ConfigError(f"{row} is read as frames; name what encodes them with model.encoder")
    encoder = load_encoder(config.model.encoder)
    return frame_units(example.frames, encoder, config.streaming.unit_seconds, row)


def _spaced(units: list[str]) -> list[str]:
    return [*units[:1], *(f" {unit}" for unit in units[1:])]


def _end(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no end token (eos_token), which marks "
            "the end of what is read; give it one"
        )
    return tokenizer.eos_token_id


def _check_spaces(tokenizer) -> None:
    """Raises ModelError: the tokenizer puts spaces before words by itself."""
    ids = text_ids(tokenizer, ("a", " b"))
    text = tokenizer.decode([*ids["a"], *ids[" b"]])
    if text != "a b":
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} joins 'a' and ' b' to '{text}', so a text "
            "cannot be cut into words; use a model with a byte-level tokenizer"
        )
