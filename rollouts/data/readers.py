"""Files, folders and Hugging Face datasets as rows: one reader per type of file.

A row comes with its place in the file, as in `row 3`, for the errors that it may cause."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.errors import DataError, one_line
from rollouts.data.parallel_text import aligned, aligned_rows
from rollouts.data.squad import squad_rows

Row = dict[str, Any]
PlacedRow = tuple[str, Row]

# Words that name the validation split of line-aligned text.
VALIDATION = frozenset(("validation", "valid", "val", "dev"))
SPLIT_WORDS = frozenset(("train", "test", "heldout", "eval")) | VALIDATION
# Files of a downloaded dataset that describe it.
NOT_DATA = frozenset(("dataset_info.json", "dataset_infos.json"))
# The most characters of another library's message in one of ours.


def sources(path: str, split: str) -> Iterator[tuple[str, Iterator[PlacedRow]]]:
    """The files of a data set, each with its rows.

    Args:
        path: a file, a folder, FOLDER/NAME of line-aligned files NAME.LANG, or a Hugging Face
            dataset as `name` or `name:config`.
        split: of the Hugging Face dataset. In a folder, files whose names say another split are
            left out.

    Yields:
        The name of a file or dataset, and its rows with their places.

    Raises:
        DataError: there is no such data, or no file of the split.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix not in READERS:
            raise DataError(
                f"{path}: files of type '{local.suffix}' are not read; "
                f"use one of: {', '.join(READERS)}"
            )
        yield str(local), _read(local)
    elif local.is_dir():
        yield from _sources_in_folder(local, split)
    elif languages := _languages_of(local):
        yield path, aligned_rows(languages)
    elif path.startswith(("/", "./", "../", "~")) or local.suffix in READERS or path.count("/") > 1:
        # No dataset of the Hub has such a name.
        raise DataError(f"{path}: no such file or folder; check data.path")
    else:
        yield path, _read_hub(path, split)


# Folders


def _sources_in_folder(folder: Path, split: str) -> Iterator[tuple[str, Iterator[PlacedRow]]]:
    files = sorted(file for file in folder.rglob("*") if not _is_hidden(file, folder))
    tables = [file for file in files if file.suffix in READERS and file.name not in NOT_DATA]
    texts = {} if tables else aligned(files)
    if not tables and not texts:
        raise DataError(
            f"{folder}: no {', '.join(READERS)} file in this folder, and no line-aligned "
            "NAME.LANG files; check data.path"
        )
    for file in _of_split(folder, tables, split):
        yield str(file), _read(file)
    for name in _of_split(folder, list(texts), split, synonyms=VALIDATION):
        yield str(name), aligned_rows(texts[name])


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _languages_of(name: Path) -> dict[str, Path] | None:
    """The files of each language of one line-aligned text, FOLDER/NAME; None: there are none."""
    files = sorted(name.parent.glob(f"{glob.escape(name.name)}.*"))
    return aligned(files).get(name)


def _of_split(
    folder: Path, paths: list[Path], split: str, synonyms: frozenset[str] = frozenset()
) -> list[Path]:
    """The paths whose words name this split, or no split.

    Args:
        folder: the words are those below it.
        synonyms: words that name one and the same split.

    Raises:
        DataError: all paths name other splits.
    """
    splits = {path: _split_words(path.relative_to(folder), synonyms) for path in paths}
    matching = [path for path, words in splits.items() if split in words or not words]
    if paths and not matching:
        known = sorted(set().union(*splits.values()))
        raise DataError(f"{folder}: no file of split '{split}'; choose one of: {', '.join(known)}")
    return matching


def _split_words(path: Path, synonyms: frozenset[str]) -> frozenset[str]:
    words = SPLIT_WORDS.intersection(re.split("[^a-z]+", str(path).lower()))
    return words | synonyms if words & synonyms else words


# One reader per type of file


def _read(file: Path) -> Iterator[PlacedRow]:
    import pyarrow

    try:
        yield from READERS[file.suffix](file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason}); convert it") from error
    except (OSError, csv.Error, pyarrow.ArrowException) as error:
        raise DataError(
            f"{file}: cannot be read as {file.suffix}: {one_line(error)}; check the file"
        ) from error


def _read_lines(file: Path) -> Iterator[PlacedRow]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", _json_row(line, f"{file} line {number}")


def _json_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: malformed JSON, {error.msg}; give one object per line, or "
            "one list of objects in a .json file"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object; each line must be one")
    return row


def _read_json(file: Path) -> Iterator[PlacedRow]:
    """A list of objects, SQuAD's articles, or an object per line."""
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        yield from _read_list(text, file)
        return
    rows = squad_rows(text, str(file))
    yield from _read_lines(file) if rows is None else rows


def _read_list(text: str, file: Path) -> Iterator[PlacedRow]:
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


def _read_parquet(file: Path) -> Iterator[PlacedRow]:
    import pyarrow.parquet

    number = 0
    with pyarrow.parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


def _read_csv(file: Path) -> Iterator[PlacedRow]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines, strict=True), 1):
            # DictReader puts cells beyond the header under None, and None into missing ones.
            if None in row or None in row.values():
                raise DataError(
                    f"{file} row {number}: not as many cells as the header has; fix the row"
                )
            yield f"row {number}", row


READERS = {".jsonl": _read_lines, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}


def _read_hub(path: str, split: str) -> Iterator[PlacedRow]:
    import datasets

    name, _, config = path.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    # The hub, the network and the dataset's own code raise errors of many kinds.
    except Exception as error:
        raise DataError(
            f"{path}: no such file or folder, and loading split '{split}' of a Hugging Face "
            f"dataset of that name failed: {one_line(error)}; check data.path"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row
