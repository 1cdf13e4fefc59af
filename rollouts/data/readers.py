"""Files, folders and Hugging Face datasets as rows: one reader per type of file.

A row comes with its place in the file, as in `row 3`, for the errors that it may cause."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from recipes.errors import DataError, one_line
from rollouts.data.parallel_text import aligned, aligned_rows
from rollouts.data.squad import squad_rows

Row = dict[str, Any]
PlacedRow = tuple[str, Row]

# Words that name the validation split of line-aligned text.
VALIDATION = frozenset(("validation", "valid", "val", "dev"))
SPLIT_WORDS = frozenset(("train", "test", "heldout", "eval")) | VALIDATION
# Files of a dataset that describe it.
NOT_DATA = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json"))
# Rows that are made of a table of Arrow at a time.
BATCH = 1024
# The most characters of a CSV cell; the csv module's own limit is 131,072.
LONGEST_CELL = 2**31 - 1


def sources(path: str, split: str) -> Iterator[tuple[str, Iterator[PlacedRow]]]:
    """The files of a data set, each with its rows.

    Args:
        path: a file, a folder, FOLDER/NAME of line-aligned files NAME.LANG, or a Hugging Face
            dataset as `name` or `name:config`.
        split: of the Hugging Face dataset, or of the several in a folder of `save_to_disk`. In
            another folder, files whose names say another split are left out.

    Yields:
        The name of a file or dataset, and its rows with their places.

    Raises:
        DataError: there is no such data, or no file of the split.
    """
    local = Path(path).expanduser()
    if local.is_file():
        if _type(local) not in READERS:
            raise DataError(
                f"{path}: files of type '{local.suffix}' are not read; "
                f"use one of: {', '.join(READERS)}"
            )
        yield str(local), _read(local)
    elif local.is_dir() and _is_saved(local):
        yield str(local), _read_saved(local, split)
    elif local.is_dir():
        yield from _sources_in_folder(local, split)
    elif languages := _languages_of(local):
        yield path, aligned_rows(languages)
    elif path.startswith(("/", "./", "../", "~")) or _type(local) in READERS or path.count("/") > 1:
        # No dataset of the Hub has such a name.
        raise DataError(f"{path}: no such file or folder; check data.path")
    else:
        yield path, _read_hub(path, split)


# Folders


def _sources_in_folder(folder: Path, split: str) -> Iterator[tuple[str, Iterator[PlacedRow]]]:
    files = sorted(file for file in folder.rglob("*") if not _is_hidden(file, folder))
    tables = [file for file in files if _type(file) in READERS and not _describes(file)]
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


def _type(file: Path) -> str:
    """The ending that says what a file holds: of a packed text, the one before `.gz`."""
    unpacked = file.with_suffix("").suffix
    return unpacked if file.suffix == ".gz" and unpacked in TEXTS else file.suffix


def _describes(file: Path) -> bool:
    """Whether a file describes the data beside it."""
    is_state = file.name == "state.json" and (file.parent / "dataset_info.json").exists()
    return is_state or file.name in NOT_DATA


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
        yield from READERS[_type(file)](file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason}); convert it") from error
    # ValueError and OverflowError: values of Arrow that Python has not, as the year 10000.
    except (OSError, EOFError, zlib.error, csv.Error, ValueError, OverflowError) as error:
        raise _unreadable(file, error) from error
    except pyarrow.ArrowException as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: cannot be read as {_type(file)}: {one_line(error)}; check the file")


def _open(file: Path, newline: str | None = None) -> TextIO:
    """A text, which may be packed."""
    open_text: Any = gzip.open if file.suffix == ".gz" else open
    return open_text(file, "rt", encoding="utf-8-sig", newline=newline)


def _parse(text: str, where: str, hint: str, is_line: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        where: the file, for errors.
        hint: what to do about malformed JSON.
        is_line: the text is one line, which `where` names too.

    Raises:
        DataError: it is malformed, or has what Python cannot read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if is_line else f" line {error.lineno}"
        raise DataError(f"{where}{line}: malformed JSON, {error.msg}; {hint}") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON is nested too deep to be read; flatten it") from error
    except ValueError as error:
        limit = sys.get_int_max_str_digits()
        number = re.search(rf"\d{{{limit + 1}}}", text)
        line = f" line {text.count(chr(10), 0, number.start()) + 1}" if number else ""
        raise DataError(
            f"{where}{'' if is_line else line}: a number of more than {limit} digits cannot be "
            "read; write it as text"
        ) from error


def _read_lines(file: Path) -> Iterator[PlacedRow]:
    with _open(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", _json_row(line, f"{file} line {number}")


def _json_row(line: str, where: str) -> Row:
    hint = "give one object per line, or one list of objects in a .json file"
    row = _parse(line, where, hint, is_line=True)
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object; each line must be one")
    return row


def _read_json(file: Path) -> Iterator[PlacedRow]:
    """A list of objects, SQuAD's articles, or an object per line."""
    with _open(file) as lines:
        text = lines.read()
    if text.lstrip().startswith("["):
        yield from _read_list(text, file)
        return
    rows = squad_rows(text, str(file))
    yield from _read_lines(file) if rows is None else rows


def _read_list(text: str, file: Path) -> Iterator[PlacedRow]:
    rows = _parse(text, str(file), "fix it")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{file} row {number}: not a JSON object; each row must be one")
        yield f"row {number}", row


def _read_parquet(file: Path) -> Iterator[PlacedRow]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        yield from _arrow_rows(table.iter_batches(BATCH))


def _read_arrow(file: Path) -> Iterator[PlacedRow]:
    """A stream, as `datasets` writes them, or a file, as Feather is."""
    from pyarrow import ipc, memory_map

    with memory_map(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if not is_file:
            yield from _arrow_rows(ipc.open_stream(source))
            return
        table = ipc.open_file(source)
        yield from _arrow_rows(map(table.get_batch, range(table.num_record_batches)))


def _arrow_rows(batches: Iterable[Any]) -> Iterator[PlacedRow]:
    """The rows of record batches."""
    number = 0
    for batch in batches:
        # `datasets` keeps cells of mixed types as JSON.
        features = _features(batch.schema) if "arrow.json" in str(batch.schema) else None
        for start in range(0, batch.num_rows, BATCH):
            for row in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield f"row {number}", features.decode_example(row) if features else row


def _features(schema: Any) -> Any:
    import datasets

    return datasets.Features.from_arrow_schema(schema)


def _read_csv(file: Path, delimiter: str = ",") -> Iterator[PlacedRow]:
    csv.field_size_limit(LONGEST_CELL)
    with _open(file, newline="") as lines:
        table = csv.DictReader(lines, strict=True, delimiter=delimiter)
        names = table.fieldnames or ()
        if len(set(names)) < len(names):
            raise DataError(f"{file}: two columns of its header have one name; rename one")
        for number, row in enumerate(table, 1):
            # DictReader puts cells beyond the header under None, and None into missing ones.
            if None in row or None in row.values():
                raise DataError(
                    f"{file} row {number}: not as many cells as the header has; fix the row"
                )
            yield f"row {number}", row


# Those of text may be packed, as in `.jsonl.gz`.
TEXTS = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
}
READERS = {**TEXTS, ".parquet": _read_parquet, ".arrow": _read_arrow}


# Datasets of Hugging Face


def _is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` made the folder."""
    has = {name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()}
    return "dataset_dict.json" in has or ("state.json" in has and _describes(folder / "state.json"))


def _read_saved(folder: Path, split: str) -> Iterator[PlacedRow]:
    """A folder of `save_to_disk`. A dataset without splits is taken whole."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    # A folder that is not whole raises errors of many kinds.
    except Exception as error:
        raise DataError(
            f"{folder}: cannot be read as a folder of save_to_disk: {one_line(error)}; "
            "check the folder"
        ) from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise DataError(f"{folder}: no split '{split}'; choose one of: {', '.join(rows)}")
        rows = rows[split]
    yield from _dataset_rows(rows, str(folder))


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
    yield from _dataset_rows(rows, path)


def _dataset_rows(rows: Any, name: str) -> Iterator[PlacedRow]:
    number = 0
    try:
        for batch in rows.iter(BATCH):
            for cells in zip(*batch.values()):
                number += 1
                yield f"row {number}", dict(zip(batch, cells))
    # Images and sounds are decoded here, by packages that may be missing.
    except Exception as error:
        raise DataError(
            f"{name}: cannot be read beyond row {number}: {one_line(error)}; check the data"
        ) from error
