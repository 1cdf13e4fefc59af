"""Turns a name, a file or a folder into examples, examples into token ids, and a step number into
prompts.

Columns that are not named are looked for in a fixed order, once per file:

- prompt: `prompt`, `messages`, `conversations`, `question`, `problem`, `instruction` (with the
  `input` that it is about), `input`; text, or a list of chat turns, of which a final one of the
  assistant is no part;
- answer: `reward_model.ground_truth`, `answer`, `final_answer`, `ground_truth`, `solution`;
- solution, the target of supervised training: that final assistant turn, else the worked text that
  the answer was taken from, else `solution`, `output`, `response`, `completion`, `chosen`; text, or
  one turn of the assistant.

An answer column may hold a worked text: `… #### 42` (GSM8K) gives the answer 42 and the solution
before it, and a `\\boxed{…}` the content of the last box. A list of answers is joined with commas.
A text to write that is named with `target_column`, as a translation is, becomes the answer and the
solution as it is."""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from recipes.errors import ConfigError, DataError
from recipes.schema import DataConfig
from rewards.math import BOX, extract_boxed
from rollouts.data.conversations import chat_turn, instruction_text, refuse_tools, target_text
from rollouts.data.stories import stories, story
from rollouts.data.streaming_cot import is_segmented, segmented
from rollouts.data.translation import translation
from rollouts.simultaneous.frames import as_frames

PROMPT_COLUMNS = (
    "prompt",
    "messages",
    "conversations",
    "question",
    "problem",
    "instruction",
    "input",
)
ANSWER_COLUMNS = ("reward_model.ground_truth", "answer", "final_answer", "ground_truth", "solution")
SOLUTION_COLUMNS = ("solution", "output", "response", "completion", "chosen")
VALIDATION = frozenset(("validation", "valid", "val", "dev"))  # of line-aligned text, one split
SPLIT_WORDS = {"train", "test", "heldout", "eval", *VALIDATION}
NOT_DATA = {"dataset_info.json", "dataset_infos.json"}  # beside the files of a downloaded dataset

Message = dict[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One problem. The last message is the user's; what a dataset does not have is None."""

    index: int  # the row of the dataset, over all its files
    messages: list[Message]  # chat turns, each with `role` and `content`
    answer: str | None = None
    solution: str | None = None  # a supervised target
    # The parts of a text that is cut into sentences, for streaming: a thought per sentence (<skip>:
    # none), then `deep` reasoning, then `final`, which holds the answer.
    sentences: tuple[str, ...] | None = None
    thoughts: tuple[str, ...] | None = None
    question: str | None = None
    final: str | None = None
    deep: str | None = None
    context: str | None = None  # the text that is read unit by unit; None: the last message is
    # [F, D] float32: the source, where it is no text (rollouts/simultaneous/frames.py)
    frames: np.ndarray | None = None
    references: tuple[str, ...] | None = None  # all answers that are right, where there are several


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt; `index` is that of its example."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    example: Example
    # streaming: what is read step by step; joined they are `token_ids`
    segments: tuple[tuple[int, ...], ...] = ()
    # streaming: what the answer opens with, before the first thought
    opening: tuple[tuple[int, ...], ...] = ()


def load_examples(
    path: str,
    *,
    split: str = "train",
    prompt_column: str | None = None,
    answer_column: str | None = None,
    target_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    size: int | None = None,
    difficulty: int | None = None,
    verbose: bool = False,
    distractors: int = 0,
    varied: bool = False,
) -> Sequence[Example]:
    """The examples of a data set.

    Args:
        path: `stories` or `translation`; a .jsonl, .json (SQuAD's too), .parquet or .csv file, or a
            folder of them (searched in depth); a folder without these, of line-aligned text
            (`rollouts.data.parallel_text`), or FOLDER/NAME of its files NAME.LANG; or a Hugging Face dataset,
            as `name` or `name:config`.
        split: of generated data or the Hugging Face dataset. In a folder, files whose name or
            subfolder says another split (train, validation, test, …) are left out; a file given by
            itself is taken whole.
        prompt_column, answer_column: a column, or a dotted path into one; None: found by name, as
            the module says. A column named here whose text has neither `####` nor a box is taken as
            the answer itself.
        target_column: the column of the text to write; it is answer and solution, whatever else the
            row has.
        limit: the first rows only.
        seed, size: of the stories and the translation; difficulty, verbose, distractors, varied: of
            the stories (`rollouts.data.stories.story`). None for the size and the difficulty: the
            defaults of `data.stories` and `data.difficulty`.

    Raises:
        DataError: one line that says what is wrong with which file and row.
    """
    if path in ("stories", "translation"):
        size = DataConfig.stories if size is None else size
        size = size if limit is None else min(size, limit)
        if path == "translation":
            return _translations(size, seed, split)
        difficulty = DataConfig.difficulty if difficulty is None else difficulty
        return _stories(
            size, seed, split, difficulty, verbose=verbose, distractors=distractors, varied=varied
        )
    examples: list[Example] = []
    for source, rows in _sources(path, split):
        left = None if limit is None else limit - len(examples)
        if left == 0:
            break
        examples += _examples(
            source,
            list(islice(rows, left)),
            prompt_column,
            answer_column,
            target_column,
            len(examples),
        )
    if not examples:
        raise DataError(f"{path}: there are no rows in it; give data with at least one")
    return examples


def configured_examples(data, seed: int, path: str | None = None, **changes) -> Sequence[Example]:
    """`load_examples` with the options of a config's section `data`, but for `path` and
    `changes`."""
    options = {
        "split": data.split,
        "prompt_column": data.prompt_column,
        "answer_column": data.answer_column,
        "target_column": data.target_column,
        "limit": data.limit,
        "size": data.stories,
        "difficulty": data.difficulty,
        "verbose": data.verbose,
        "distractors": data.distractors,
        "varied": data.varied,
    }
    return load_examples(path or data.path, seed=seed, **options | changes)


class Generated(Sequence[Example]):
    """Examples that are made each time they are looked at, by a function of their index."""

    def __init__(self, count: int, make: Callable[[int], Example]):
        self.count, self.make = count, make
        if count:
            make(0)  # wrong arguments are an error here, not at the first use

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        chosen = range(self.count)[index]  # negative numbers and IndexError as in a list
        return [self.make(i) for i in chosen] if isinstance(chosen, range) else self.make(chosen)


def _stories(count: int, seed: int, split: str, difficulty: int, **options) -> Generated:
    """Those for training are made when they are looked at; held-out ones, which are all different,
    at once."""
    held_out = (
        None
        if split == "train"
        else stories(count, seed=seed, split=split, difficulty=difficulty, **options)
    )

    def example(index: int) -> Example:
        made = held_out[index] if held_out else story(seed, index, split, difficulty, **options)
        return Example(
            index,
            [{"role": "user", "content": made.prompt}],
            made.answer,
            made.solution,
            made.sentences,
            made.thoughts,
            made.question,
            made.final,
            made.deep,
        )

    return Generated(count, example)


def _translations(count: int, seed: int, split: str) -> Generated:
    def example(index: int) -> Example:
        made = translation(seed, index, split)
        return Example(index, [{"role": "user", "content": made.source}], made.target, made.target)

    return Generated(count, example)


# Files and their rows


def _sources(path: str, split: str) -> Iterator[tuple[str, Iterator[tuple[str, Row]]]]:
    """Pairs of a file's name and its rows; a row comes with its place, as in `row 3`."""
    from rollouts.data.parallel_text import aligned, aligned_rows  # that module needs this one

    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix not in READERS:
            raise DataError(
                f"{path}: files of type '{local.suffix}' are not read; "
                f"use one of: {', '.join(READERS)}"
            )
        yield str(local), _read(local)
    elif local.is_dir():
        files = sorted(
            file
            for file in local.rglob("*")
            if not any(part.startswith(".") for part in file.relative_to(local).parts)
        )
        tables = [file for file in files if file.suffix in READERS and file.name not in NOT_DATA]
        texts = {} if tables else aligned(files)
        if not tables and not texts:
            raise DataError(
                f"{local}: no {', '.join(READERS)} file in this folder, and no line-aligned NAME.LANG "
                "files; check data.path"
            )
        for file in _of_split(local, tables, split):
            yield str(file), _read(file)
        for name in _of_split(local, list(texts), split, VALIDATION):
            yield str(name), aligned_rows(texts[name])
    elif texts := aligned(sorted(local.parent.glob(f"{glob.escape(local.name)}.*"))).get(local):
        yield path, aligned_rows(texts)
    elif path.startswith(("/", "./", "../", "~")) or local.suffix in READERS or path.count("/") > 1:
        raise DataError(f"{path}: no such file or folder; check data.path")
    else:
        yield path, _read_hub(path, split)


def _of_split(
    folder: Path, paths: list[Path], split: str, same: frozenset[str] = frozenset()
) -> list[Path]:
    """The paths whose words say this split, or none; `same`: words that say one split."""

    def words(path: Path) -> set[str]:
        found = SPLIT_WORDS & set(re.split("[^a-z]+", str(path.relative_to(folder)).lower()))
        return found | same if found & same else found

    chosen = [path for path in paths if split in words(path) or not words(path)]
    if paths and not chosen:
        there = sorted(set.union(*map(words, paths)))
        raise DataError(f"{folder}: no file of split '{split}'; choose one of: {', '.join(there)}")
    return chosen


def _read(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow

    try:
        yield from READERS[file.suffix](file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason}); convert it") from error
    except (OSError, csv.Error, pyarrow.ArrowException) as error:
        reason = _one_line(error)
        raise DataError(
            f"{file}: cannot be read as {file.suffix}: {reason}; check the file"
        ) from error


def _read_lines(file: Path) -> Iterator[tuple[str, Row]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", _json_row(file, line, number)


def _read_json(file: Path) -> Iterator[tuple[str, Row]]:
    from rollouts.data.parallel_text import squad_rows

    text = file.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        rows = squad_rows(text, str(file))
        yield from _read_lines(file) if rows is None else rows
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file} line {error.lineno}: malformed JSON, {error.msg}; fix it"
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{file} row {number}: not a JSON object; each row must be one")
        yield f"row {number}", row


def _json_row(file: Path, line: str, number: int) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file} line {number}: malformed JSON, {error.msg}; give one object per line, or "
            "one list of objects in a .json file"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{file} line {number}: not a JSON object; each line must be one")
    return row


def _read_parquet(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


def _read_csv(file: Path) -> Iterator[tuple[str, Row]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines, strict=True), 1):
            if None in row or None in row.values():
                raise DataError(
                    f"{file} row {number}: not as many cells as the header has; fix the row"
                )
            yield f"row {number}", row


READERS = {".jsonl": _read_lines, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}


def _read_hub(path: str, split: str) -> Iterator[tuple[str, Row]]:
    import datasets

    name, _, config = path.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    # the hub, the network, the dataset: many kinds, all the user's to read
    except Exception as error:
        raise DataError(
            f"{path}: no such file or folder, and loading split '{split}' of a Hugging Face "
            f"dataset of that name failed: {_one_line(error)}; check data.path"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")[:300]


# Rows to examples


def _examples(
    source: str,
    rows: list[tuple[str, Row]],
    prompt_column: str | None,
    answer_column: str | None,
    target_column: str | None,
    first_index: int,
) -> Iterator[Example]:
    from rollouts.data.parallel_text import is_squad, squad

    if not rows:
        return
    columns = list(dict.fromkeys(name for _, row in rows for name in row))

    def first_of(names: Iterable[str]) -> str | None:
        return next(
            (name for name in names if any(_cell(row, name) is not None for _, row in rows)), None
        )

    named = {
        "prompt_column": prompt_column,
        "answer_column": answer_column,
        "target_column": target_column,
    }
    fields = (
        segmented
        if is_segmented(columns) and not (prompt_column or target_column)
        else squad
        if is_squad(rows[0][1]) and not any(named.values())
        else None
    )
    if fields is not None:
        for index, (place, row) in enumerate(rows, first_index):
            yield Example(index, **fields(row, f"{source} {place}"))
        return
    for key, column in named.items():
        if column is not None and first_of([column]) is None:
            raise DataError(
                f"{source}: no column '{column}' (data.{key}); its columns: {', '.join(columns)}"
            )
    prompt = prompt_column or first_of(PROMPT_COLUMNS)
    if prompt is None:
        raise DataError(
            f"{source}: none of its columns is known to hold prompts: {', '.join(columns)}; "
            "set data.prompt_column to the one that does"
        )
    answers = answer_column or first_of(ANSWER_COLUMNS)
    solutions = first_of(SOLUTION_COLUMNS)
    for index, (place, row) in enumerate(rows, first_index):
        frames = as_frames(_cell(row, prompt), source) if prompt_column else None
        refuse_tools(row, f"{source} {place}")
        asked = (
            instruction_text(row)
            if prompt == "instruction" and not prompt_column
            else _cell(row, prompt)
        )
        messages, target = _chat(
            "frames" if frames is not None else asked, f"{source} {place}", prompt
        )
        answer, worked = _answer(
            _cell(row, answers), is_text=answers == "solution" and answer_column is None
        )
        solution = (
            target
            or worked
            or _text(target_text(_cell(row, solutions), f"{source} {place}", solutions))
        )
        if answer is None:
            answer = _answer(solution, is_text=True)[0]
        if target_column is not None:
            answer = solution = (
                cell if isinstance(cell := _cell(row, target_column), str) else _text(cell)
            )
        yield Example(index, messages, answer, solution, frames=frames)


def _cell(row: Row, column: str | None) -> Any:
    """The value of a column, or of a dotted path into nested ones; None where there is none."""
    if column is None or column in row:
        return row.get(column)
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _chat(value: Any, where: str, column: str) -> tuple[list[Message], str | None]:
    """The turns up to the last one of the user, and the assistant's that followed it."""
    if value is None:
        raise DataError(f"{where}: no '{column}'; give every row a prompt, or drop the row")
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list):
        raise DataError(
            f"{where}: '{column}' is neither text nor a list of turns with role and content text"
        )
    turns = [chat_turn(turn, where, column) for turn in turns]
    target = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else None
    if not turns or not turns[-1]["content"].strip():
        raise DataError(f"{where}: '{column}' is empty; give every row a prompt, or drop the row")
    return turns, target


def _text(value: Any) -> str | None:
    """A cell as text: the first of several worked solutions, None for an empty one."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of integers with a gap comes back as floats
    text = "" if value is None else str(value).strip()
    return text or None


def _answer(value: Any, is_text: bool) -> tuple[str | None, str | None]:
    """The answer in a cell, and the worked text it was taken from. `is_text`: no mark, no
    answer."""
    if isinstance(value, list) and not is_text:
        value = ", ".join(filter(None, map(_text, value)))
    text = _text(value)
    if text is None:
        return None, None
    if gsm8k := re.fullmatch(r"(.*)####\s*(\S[^\n]*)", text, re.DOTALL):
        return re.sub(r"(?<=\d),(?=\d{3})", "", gsm8k[2]), gsm8k[1].strip() or None
    if boxed := extract_boxed(text):
        only_a_box = re.fullmatch(rf"\$*{BOX}[^\n]*\}}\$*\.?", text)
        return boxed, None if only_a_box else text
    return (None, text) if is_text else (text, None)


# Examples to prompts


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
            reason = _one_line(error)
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


class PromptSampler:
    """Which prompts each step takes: each once per epoch, in that epoch's order; steps may straddle
    epochs.

    It has no state to save: a resumed run asks for step n and gets what an uninterrupted one got.
    """

    def __init__(self, count: int, per_step: int, seed: int):
        """`count` prompts, of which a step takes `per_step` (which may be more than `count`)."""
        if count < 1 or per_step < 1:
            raise ValueError(f"cannot sample {per_step} of {count} prompts")
        self.count, self.per_step, self.seed = count, per_step, seed
        self._cached: tuple[int, list[int]] = (-1, [])

    def indices(self, step: int) -> list[int]:
        """The prompts of a step, `per_step` numbers in 0 .. count - 1; steps count from 0."""
        if step < 0:
            raise ValueError(f"step {step} is below 0")
        places = range(step * self.per_step, (step + 1) * self.per_step)
        return [self._order(place // self.count)[place % self.count] for place in places]

    def _order(self, epoch: int) -> list[int]:
        if self._cached[0] != epoch:  # places go up, so one epoch at a time is enough
            order = list(range(self.count))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._cached = epoch, order
        return self._cached[1]
