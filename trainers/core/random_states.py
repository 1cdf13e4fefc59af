"""The states of the generators that a run may draw from, as text."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path

import numpy as np
import torch

from recipes.errors import CheckpointError, one_line
from trainers.core import distributed


def seed(value: int) -> None:
    """Seed every generator."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def file_of_rank(folder: Path) -> Path:
    """This rank's file in a checkpoint."""
    return folder / f"random_{distributed.rank()}.json"


def save(folder: Path) -> Path:
    """Write this rank's states into a checkpoint's folder; returns the file."""
    kind, keys, position, has_normal, normal = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), position, has_normal, normal],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    path = file_of_rank(folder)
    path.write_text(json.dumps(states))
    return path


def load(folder: Path) -> None:
    """Restore this rank's states from a checkpoint.

    A rank that the saved run did not have keeps its own.

    Raises:
        CheckpointError: the file has another form.
    """
    path = file_of_rank(folder)
    if not path.exists():
        return
    try:
        states = json.loads(path.read_text())
        version, keys, normal = states["python"]
        random.setstate((version, tuple(keys), normal))
        np.random.set_state(tuple(states["numpy"]))
        torch.set_rng_state(_tensor(states["torch"]))
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(_tensor(states["cuda"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint file {path} cannot be read ({one_line(error)})"
        ) from error


def _text(state: torch.Tensor) -> str:
    """The bytes of a generator's state."""
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
