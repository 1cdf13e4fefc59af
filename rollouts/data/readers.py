"""Files, folders and Hugging Face datasets as rows: one reader per type of file.

A row comes with its place, as in `row 3`, which its errors name."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.errors import DataError
from rollouts.data.parallel_text import aligned, aligned_rows
from rollouts.data.squad import squad_rows

VALIDATION = frozenset(("validation", "valid", "val", "dev"))  # of line-aligned text, one split
SPLIT_WORDS = {"train", "test", "heldout", "eval", *VALIDATION}
NOT_DATA = {"dataset_info.json", "dataset_infos.json"}  # beside the files of a downloaded dataset
Row = dict[str, Any]


def sources(path: str, split: str) -> Iterator[tuple[str, Iterator[tuple[str, Row]]]]:
    """Pairs of a file's name and its rows; a row comes with its place, as in `row 3`."""
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
        reason = one_line(error)
        raise DataError(
            f"{file}: cannot be read as {file.suffix}: {reason}; check the file"
        ) from error


def _read_lines(file: Path) -> Iterator[tuple[str, Row]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", _json_row(file, line, number)


def _read_json(file: Path) -> Iterator[tuple[str, Row]]:
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
            f"dataset of that name failed: {one_line(error)}; check data.path"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")[:300]
