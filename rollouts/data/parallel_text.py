"""Reads line-aligned text: files NAME.LANG or NAME.LANG.gz.

Line n of one file is the translation of line n of the others. A row has a column per language, such
as `en` and `de`. In a folder, NAME says the split; val, valid, validation and dev are one split."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from recipes.errors import DataError

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
