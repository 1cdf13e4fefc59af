"""Changed bytes in a checkpoint's files: whether a resume sees each of them."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.fault_campaign.processes import start

# Of a manifest, the part of its bytes that is tried: every so many, and all before its files.
STRIDE = 16


def flip(path: Path, place: int | None = None) -> None:
    """Change one bit of a file.

    Args:
        path: the file's.
        place: of the byte; None: in the middle.
    """
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def unseen(run: Path, keys: list[str], folder: Path) -> list[str]:
    """The changed bytes of the newest checkpoint with which a resume would go on.

    Args:
        run: with two checkpoints or more. It is left as it was.
        keys: of the run.
        folder: takes the output of the process that looks.

    Raises:
        RuntimeError: that process failed.
    """
    answer = folder / "unseen.json"

    def work() -> None:
        answer.write_text(json.dumps([*_files(run, keys), *_manifest(run)]))

    ended = start(work, folder / "corruption").wait(300)
    if ended.status or ended.hung:
        raise RuntimeError(f"corrupt: {ended.how}: {ended.message}")
    return json.loads(answer.read_text())


def _files(run: Path, keys: list[str]) -> list[str]:
    """The files of which a change is not seen, or for which no earlier checkpoint is taken."""
    from recipes.compose import compose
    from recipes.errors import OnstreamError
    from trainers.core import checkpoint
    from trainers.core.rundir import run_directory
    from trainers.prepare import resume_facts

    config = compose([*keys, "resume=auto"])
    before, newest = checkpoint.complete(run)[-2:]
    found = []
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        flip(path)
        messages: list[str] = []
        try:
            _, point, _ = run_directory(config, resume_facts(config), messages)
        except OnstreamError as error:
            found.append(f"{path.name}: {error}")
        else:
            # A changed manifest may accuse the file that it has another checksum of.
            named = path.name == checkpoint.MANIFEST or path.name in " ".join(messages)
            if point != before or not named:
                found.append(f"{path.name}: resumed from {point.name}, {messages}")
        flip(path)
    return found


def _manifest(run: Path) -> list[str]:
    """The places of the manifest of which a change is not seen."""
    from recipes.errors import CheckpointError
    from trainers.core import checkpoint

    newest = checkpoint.complete(run)[-1]
    path = newest / checkpoint.MANIFEST
    content = path.read_bytes()
    facts = content.find(b'"files"')
    found = []
    for place in [*range(facts), *range(facts, len(content), STRIDE)]:
        flip(path, place)
        try:
            checkpoint.verify(newest)
            changed = path.read_text()[max(0, place - 12) : place + 8].split()
            found.append(f"{path.name}, byte {place}: …{' '.join(changed)}…")
        except CheckpointError:
            pass
        flip(path, place)
    return found
