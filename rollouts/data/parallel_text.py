"""Reads parallel text and question answering, and cuts texts into what is read and written unit by
unit.

- Line-aligned text: files NAME.LANG or NAME.LANG.gz, line n of one being the translation of line n
  of the others. A row has a column per language, such as `en` and `de`. In a folder, NAME says the
  split; val, valid, validation and dev are one split.
- SQuAD's JSON and the Hub's rows of it: `context`, `question` and the `answers`. The answer of a
  question that cannot be answered (SQuAD 2) is `unanswerable`.
- Units, for simultaneous generation: a source is read in words or sentences, and a target is
written in words."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from recipes.errors import ConfigError, DataError, ModelError
from rollouts.data.load import Example, Prompt
from rollouts.simultaneous.frames import frame_units, load_encoder
from rollouts.streaming.prompts import Ids, chat_frame, split_sentences

LANGUAGE_FILE = re.compile(r"(.+)\.([a-z]{2,3}(?:[-_][A-Za-z]{2,4})?)")
NOT_LANGUAGES = {
    "cfg",
    "csv",
    "ini",
    "log",
    "md",
    "py",
    "sh",
    "tar",
    "tsv",
    "txt",
    "xml",
    "yml",
    "zip",
}
UNITS = {"word": str.split, "sentence": split_sentences}  # values of streaming.unit
UNANSWERABLE = "unanswerable"


# Line-aligned text


def aligned(files: Iterable[Path]) -> dict[Path, dict[str, Path]]:
    """The line-aligned texts among some files: FOLDER/NAME, and the file of each of its two or more
    languages.

    Of NAME.LANG and NAME.LANG.gz, that which comes first is taken.
    """
    texts: dict[Path, dict[str, Path]] = {}
    for file in files:
        if (found := LANGUAGE_FILE.fullmatch(file.name.removesuffix(".gz"))) and found[
            2
        ] not in NOT_LANGUAGES:
            texts.setdefault(file.parent / found[1], {}).setdefault(found[2], file)
    return {name: languages for name, languages in texts.items() if len(languages) > 1}


def aligned_rows(languages: dict[str, Path]) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and row of each line.

    Raises:
        DataError: the files have different numbers of lines, or one cannot be read.
    """
    counts = {file: sum(1 for _ in _lines(file)) for file in languages.values()}
    if len(set(counts.values())) > 1:
        raise DataError(
            "line-aligned files of different lengths: "
            f"{', '.join(f'{file} has {count} lines' for file, count in counts.items())}; line n of each "
            "must be a translation of the others'"
        )
    for number, cells in enumerate(zip(*map(_lines, languages.values())), 1):
        yield f"line {number}", dict(zip(languages, cells))


def _lines(file: Path) -> Iterator[str]:
    try:  # no line ends but \n: a translation may hold others
        with (gzip.open if file.suffix == ".gz" else open)(
            file, "rt", encoding="utf-8-sig", newline="\n"
        ) as lines:
            for line in lines:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason}); convert it") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{file}: cannot be read: {' '.join(str(error).split())}; check the file"
        ) from error


# Question answering


def squad_rows(text: str, file: str) -> Iterator[tuple[str, dict[str, Any]]] | None:
    """Place and row of each question of a SQuAD file, in the form of the Hub's rows; None where the
    JSON is another.

    Raises:
        DataError: an article is not as SQuAD has it.
    """
    try:
        content = json.loads(text)
    except ValueError:  # perhaps one object per line
        return None
    articles = content.get("data") if isinstance(content, dict) else None
    if not isinstance(articles, list) or not all(
        isinstance(a, dict) and "paragraphs" in a for a in articles[:1]
    ):
        return None
    return _squad_rows(articles, file)


def _squad_rows(articles: list, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for place, article in enumerate(articles, 1):
        try:
            asked = [
                (
                    paragraph["context"],
                    qa["question"],
                    qa.get("is_impossible"),
                    [answer["text"] for answer in qa.get("answers") or ()],
                )
                for paragraph in article["paragraphs"]
                for qa in paragraph["qas"]
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file} article {place}: not as SQuAD has it ({type(error).__name__}: {error}); each "
                "paragraph needs a context and qas, and each of these a question"
            ) from error
        for context, question, impossible, texts in asked:
            number += 1
            known = {"text": [] if impossible else texts} if texts or impossible else None
            yield f"question {number}", {"context": context, "question": question, "answers": known}


def is_squad(row: dict[str, Any]) -> bool:
    """Whether a row has a text, a question on it and a list of answers to that, perhaps empty or
    unknown."""
    answers = row.get("answers", "")
    return {"context", "question"} <= set(row) and (
        answers is None or isinstance(answers, dict) and isinstance(answers.get("text"), list)
    )


def squad(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of an `Example` of one row, all but its index.

    Args:
        where: file and row, for errors.

    Raises:
        DataError: its context or question is no text, or is empty, or its answers have another
            form.
    """
    if not is_squad(row):
        raise DataError(
            f"{where}: its answers are not as SQuAD has them; give an object with a list 'text', or null"
        )
    for name in ("context", "question"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise DataError(f"{where} has no text '{name}'; give it, or drop the row")
    context, question = row["context"], row["question"].strip()
    texts = (
        None
        if row["answers"] is None
        else tuple(dict.fromkeys(row["answers"]["text"])) or (UNANSWERABLE,)
    )
    first = texts and texts[0]
    return {
        "messages": [{"role": "user", "content": f"{context} {question}"}],
        "answer": first,
        "solution": first,
        "question": question,
        "context": context,
        "references": texts,
    }


# Units


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
