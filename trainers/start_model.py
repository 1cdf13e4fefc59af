"""The model that a run starts from: `model.path`, or a copy of it that has the method's tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from recipes.embedded import model_folder
from rollouts.streaming.tokens import extend_model
from trainers.core import distributed

# In the copy: what it was made of.
SOURCE = "source.json"


def start_model(run) -> str:
    """`model.path`; or, where it lacks tokens, the folder RUN/start of a copy that has them.

    A copy that is there is taken if it was made of the same files. A collective.

    Args:
        run: the `Run`, checked.
    """
    path = run.config.model.path
    if not run.new_tokens:
        return path
    folder = run.directory / "start"
    if distributed.rank() == 0:
        source = {"tokens": run.new_tokens, **source_of(path)}
        if _recorded(folder) != source:
            if folder.exists():
                run.messages.append(f"model  {folder} was of other files and is made anew")
            for old in (folder, folder.with_name("start.part")):
                shutil.rmtree(old, ignore_errors=True)
            trusted = run.config.model.trust_remote_code
            extend_model(path, run.tokenizer, run.new_tokens, folder, trusted)
            (folder / SOURCE).write_text(json.dumps(source, indent=1))
    distributed.barrier()
    return str(folder)


def source_of(path: str) -> dict[str, Any]:
    """Which files a model is: their folder, sizes and times; of a hub name the commit."""
    from transformers.utils import cached_file

    folder = Path(model_folder(path))
    if not folder.is_dir():
        try:
            # In a folder that has the commit's name.
            cached = cached_file(path, "config.json", local_files_only=True)
        except OSError:
            return {"model": path, "commit": None}
        return {"model": path, "commit": Path(cached).parent.name}
    files = sorted(file for file in folder.iterdir() if file.is_file())
    stats = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return {"model": str(folder.resolve()), "files": stats}


def _recorded(folder: Path) -> dict[str, Any] | None:
    """What a copy was made of; None: it does not say, or there is none."""
    try:
        return json.loads((folder / SOURCE).read_text())
    except (OSError, ValueError):
        return None
