"""The names of models: `model.path=stories-student` names a folder of `recipes/models`, and
`model.path=smollm2-135m` a model that a package carries (recipes/packaged_models.py).

The folders hold Qwen3 decoders of 0.65M parameters. `recipes/models/README.md` says what each is
for, `manifest.json` how it was made; `python -m scripts.tiny_models --remake` makes them again.
"""

from __future__ import annotations

import json
from pathlib import Path

from recipes import packaged_models, smaller_models

FOLDER = Path(__file__).resolve().parent / "models"
MANIFEST = "manifest.json"


def names() -> list[str]:
    """The names of the embedded models."""
    return sorted(file.parent.name for file in FOLDER.glob("*/config.json"))


def known_names() -> list[str]:
    """Every name that stands for a model: those of embedded, packaged and smaller models."""
    return sorted([*names(), *packaged_models.MODELS, *smaller_models.MODELS])


def manifest(folder: Path = FOLDER) -> dict:
    """What is known of each model of a folder: how it was made, its checksums, its accuracy."""
    return json.loads((folder / MANIFEST).read_text())


def model_folder(path: str) -> str:
    """A model's path as transformers and vLLM take it.

    The name of a model becomes its folder; a packaged model is fetched where it is missing. `~`
    becomes the home directory, and a hub name stays as it is. A folder of one's own that has the
    name of a model is written `./stories-student`.

    Raises:
        ModelError: a packaged model cannot be fetched or kept.
    """
    if path in names():
        return str(FOLDER / path)
    if path in packaged_models.MODELS:
        return str(packaged_models.packaged_folder(path))
    if path in smaller_models.MODELS:
        return str(smaller_models.smaller_folder(path))
    return str(Path(path).expanduser()) if path.startswith("~") else path
