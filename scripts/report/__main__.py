"""The command line: `python -m scripts.report RUN_DIR [OTHER_DIR …]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipes.errors import DataError
from scripts.report.page import write_report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m scripts.report", description="Write RUN_DIR/report.html."
    )
    parser.add_argument(
        "run_dir",
        type=Path,
        nargs="+",
        help="a run directory; further ones are compared with the first",
    )
    folders = parser.parse_args(arguments).run_dir
    try:
        for folder in folders:
            require_run(folder)
        print(write_report(*folders))
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


def require_run(folder: Path) -> None:
    """Raises DataError: the folder holds nothing that a report could show."""
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "curves.json")):
        raise DataError(
            f"{folder}: no metrics.jsonl here; give a run directory (run.dir of a training run)"
        )


if __name__ == "__main__":
    main()
