"""Reads sources of frames, as speech is.

`rollouts.simultaneous.frames` has the encoder that turns them into embeddings."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from recipes.errors import DataError, one_line

FRAMES_FILE = re.compile(r"\S+\.npy")


def as_frames(cell, source: str, where: str) -> np.ndarray | None:
    """The frames in a cell of a table.

    Args:
        cell: a list of lists of numbers, the path of a .npy file, or anything else.
        source: the table's file. The .npy file lies beside it.
        where: file and row, for errors.

    Returns:
        [F, D] float32; None where the cell holds something else.

    Raises:
        DataError: the frames cannot be read, or are no table of numbers.
    """
    is_table = isinstance(cell, list) and bool(cell) and isinstance(cell[0], list)
    is_file = isinstance(cell, str) and bool(FRAMES_FILE.fullmatch(cell))
    if not is_table and not is_file:
        return None
    try:
        numbers = np.load(Path(source).parent / cell) if is_file else cell
        frames = np.asarray(numbers, dtype=np.float32)
    except (OSError, EOFError, ValueError, TypeError, OverflowError) as error:
        reason = one_line(error)
        raise DataError(f"{where}: frames that cannot be read: {reason}; check them") from error
    if frames.ndim != 2 or not len(frames):
        raise DataError(
            f"{where}: frames of shape {frames.shape}; a source is [frames, numbers per frame]"
        )
    return frames
