"""The command line: `python -m scripts.report RUN_DIR [OTHER_DIR …]`."""

from __future__ import annotations

from pathlib import Path

import scripts.report
from recipes.errors import ConfigError, DataError
from scripts.cli import launch, run_command
from scripts.report.page import write_report

OWN_KEYS = {"RUN_DIR …": "Run directories; further ones are compared with the first."}


def main(arguments: list[str]) -> int:
    """Returns the exit status; a mistake of the user's ends in one line on stderr."""
    return run_command(report, arguments, scripts.report.__doc__ or "", OWN_KEYS)


def report(arguments: list[str]) -> None:
    """Write RUN_DIR/report.html.

    Raises:
        ConfigError: no directory is named.
        DataError: one holds no run, or the page cannot be written.
    """
    folders = [Path(argument) for argument in arguments]
    if not folders:
        raise ConfigError("a run directory is missing: python -m scripts.report RUN_DIR")
    for folder in folders:
        require_run(folder)
    try:
        print(write_report(*folders))
    except OSError as error:
        raise DataError(str(error)) from error


def require_run(folder: Path) -> None:
    """Raises DataError: the folder holds nothing that a report could show."""
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "curves.json")):
        raise DataError(
            f"{folder}: no metrics.jsonl here; give a run directory (run.dir of a training run)"
        )


if __name__ == "__main__":
    launch(main)
