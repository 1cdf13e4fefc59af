"""Reads line-aligned text: files NAME.LANG or NAME.LANG.gz.

Line n of one file is the translation of line n of the others. A row has a column per language, such
as `en` and `de`. In a folder, NAME says the split; val, valid, validation and dev are one split."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from recipes.errors import DataError, one_line

LANGUAGE_FILE = re.compile(r"(?P<name>.+)\.(?P<language>[a-z]{2,3}(?:[-_][A-Za-z]{2,4})?)")
# Endings of other files that look like the code of a language.
NOT_LANGUAGES = frozenset(
    ("cfg", "csv", "ini", "log", "md", "py", "sh", "tar", "tsv", "txt", "xml", "yml", "zip")
)


def aligned(files: Iterable[Path]) -> dict[Path, dict[str, Path]]:
    """The line-aligned texts among some files.

    Returns:
        By FOLDER/NAME, the file of each of its two or more languages. Of NAME.LANG and
        NAME.LANG.gz, that which comes first is taken.
    """
    texts: dict[Path, dict[str, Path]] = {}
    for file in files:
        match = LANGUAGE_FILE.fullmatch(file.name.removesuffix(".gz"))
        if match and match["language"] not in NOT_LANGUAGES:
            languages = texts.setdefault(file.parent / match["name"], {})
            languages.setdefault(match["language"], file)
    return {name: languages for name, languages in texts.items() if len(languages) > 1}


def aligned_rows(languages: dict[str, Path]) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and row of each line.

    Args:
        languages: the file of each language.

    Raises:
        DataError: the files have different numbers of lines, or one cannot be read.
    """
    counts = {file: sum(1 for _ in _lines(file)) for file in languages.values()}
    if len(set(counts.values())) > 1:
        lengths = ", ".join(f"{file} has {count} lines" for file, count in counts.items())
        raise DataError(
            f"line-aligned files of different lengths: {lengths}; line n of each must be a "
            "translation of the others'"
        )
    for number, cells in enumerate(zip(*map(_lines, languages.values())), 1):
        yield f"line {number}", dict(zip(languages, cells))


def _lines(file: Path) -> Iterator[str]:
    open_text = gzip.open if file.suffix == ".gz" else open
    try:
        # Only \n ends a line: a translation may hold other line breaks.
        with open_text(file, "rt", encoding="utf-8-sig", newline="\n") as lines:
            for line in lines:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason}); convert it") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = one_line(error)
        raise DataError(f"{file}: cannot be read: {reason}; check the file") from error
