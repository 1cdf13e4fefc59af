"""Models that come with the project: `model.path=stories-student` names a folder of
`recipes/models`.

They are Qwen3 decoders of 0.65M parameters. `recipes/models/README.md` says what each is for,
`manifest.json` how it was made; `python -m scripts.tiny_models --remake` makes them again."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "models"
MANIFEST = "manifest.json"


def names() -> list[str]:
    """The names of the embedded models."""
    return sorted(file.parent.name for file in FOLDER.glob("*/config.json"))


def manifest(folder: Path = FOLDER) -> dict:
    """What is known of each model of a folder: how it was made, its checksums, its accuracy."""
    return json.loads((folder / MANIFEST).read_text())


def model_folder(path: str) -> str:
    """A model's path as transformers and vLLM take it.

    The name of an embedded model becomes its folder, and `~` the home directory. A hub name stays
    as it is. A folder of one's own that has the name of an embedded model is written
    `./stories-student`."""
    if path in names():
        return str(FOLDER / path)
    return str(Path(path).expanduser()) if path.startswith("~") else path
