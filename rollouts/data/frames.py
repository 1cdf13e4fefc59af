"""Reads sources of frames, as speech is.

The encoder of frames is in `rollouts.simultaneous.frames`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from recipes.errors import DataError


def as_frames(cell, source: str) -> np.ndarray | None:
    """[F, D] float32 of a cell that holds frames; None where it holds something else.

    Raises:
        DataError: they cannot be read, or are no table of numbers.
    """
    numbers = isinstance(cell, list) and bool(cell) and isinstance(cell[0], list)
    if not numbers and not (isinstance(cell, str) and re.fullmatch(r"\S+\.npy", cell)):
        return None
    try:
        frames = np.asarray(
            cell if numbers else np.load(Path(source).parent / cell), dtype=np.float32
        )
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise DataError(
            f"{source}: frames that cannot be read: {' '.join(str(error).split())}"
        ) from error
    if frames.ndim != 2 or not len(frames):
        raise DataError(
            f"{source}: frames of shape {frames.shape}; a source is [frames, numbers per frame]"
        )
    return frames
