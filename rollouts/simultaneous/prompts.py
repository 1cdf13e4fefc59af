"""Prompts of a model that reads a source unit by unit and writes in between.

A source is read in words, in sentences, or in seconds of speech. A target is written in words. In a
language without spaces between words, a word is a character (recipes/languages.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from recipes.errors import ConfigError, DataError, ModelError
from recipes.languages import base, characters, is_spaceless, named_by, runs_on
from rollouts.data.chat import SourceFrame, drop_overlong, text_ids
from rollouts.data.examples import Example, Ids, Prompt
from rollouts.data.sentences import split_sentences
from rollouts.simultaneous.frames import frame_units, load_encoder

Cut = Callable[[str], list[str]]


def target_cut(config) -> Cut:
    """What cuts a target into words, as the language of the run's targets has them.

    Each but the first has the white space before it.
    """
    return characters if is_spaceless(target_language(config)) else _spaced_words


def target_language(config) -> str | None:
    """`streaming.target_language`, else that which `data.target_column` names."""
    return config.streaming.target_language or named_by(config.data.target_column)


def _source_language(config) -> str | None:
    return config.streaming.source_language or named_by(config.data.prompt_column)


def _source_cut(config) -> Cut:
    """What cuts a source into its units (`streaming.unit`), as `target_cut` does."""
    language = _source_language(config)
    if not is_spaceless(language):
        by_words = config.streaming.unit == "word"
        return _spaced_words if by_words else lambda text: _spaced(split_sentences(text))
    return characters if config.streaming.unit == "word" else partial(_sentences, language)


def _spaced_words(text: str) -> list[str]:
    return _spaced(text.split())


def _sentences(language: str, text: str) -> list[str]:
    """The sentences of a text; joined, they are the text without white space at its ends."""
    from sentencex import segment

    return [sentence for sentence in segment(base(language), text.strip()) if sentence]


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
      first. So the joined ids spell the source with single spaces. In a language without spaces a
      word is a character, and the joined ids spell the source as it is.
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
        ConfigError: `data.template=chat` without a chat template, frames without an encoder, or a
            text without spaces whose language is not known.
        ModelError: the tokenizer has no end token, or puts spaces before words by itself.
    """
    end = _end(tokenizer)
    _check_spaces(tokenizer)
    frame = SourceFrame(tokenizer, config.data, config.streaming.instruction)
    cut = _source_cut(config)
    examples = list(examples)
    _check_languages(examples, config, where)
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


def target_words(text: str, tokenizer, cut: Cut = _spaced_words) -> list[Ids]:
    """The ids of each word of a target, then the end token by itself.

    All words but the first have the space before them.

    Args:
        cut: `target_cut`; by default it cuts at spaces.

    Raises:
        ModelError: the tokenizer has no end token.
    """
    end = _end(tokenizer)
    words = cut(text)
    ids = text_ids(tokenizer, words)
    return [*(ids[word] for word in words), (end,)]


def _source(example: Example, frame: SourceFrame, cut: Cut, where: str) -> _Source:
    before, after = frame.around(example)
    has_context = example.context is not None
    text = _source_text(example)
    _check_text("source", text, example, where)
    _check_text("target", example.solution, example, where)
    if has_context and example.question is not None:
        before = f"{before}{example.question}\n"
    units = [] if example.frames is not None else cut(text)
    return _Source(before, units, after)


def _source_text(example: Example) -> str:
    return example.messages[-1]["content"] if example.context is None else example.context


def _check_languages(examples: Sequence[Example], config, where: str) -> None:
    """Raises ConfigError: a text has no spaces, so it would be a single word, and nobody says what
    language it is in."""
    for example in examples:
        for key, language, text in (
            ("streaming.source_language", _source_language(config), _source_text(example)),
            ("streaming.target_language", target_language(config), example.solution or ""),
        ):
            if language is None and runs_on(text):
                raise ConfigError(
                    f"{where}: row {example.index} has text without spaces between words; "
                    f"name its language, as in {key}=zh, or another, as en, to cut at spaces"
                )


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
