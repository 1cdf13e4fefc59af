"""Run by test_checkpoint.py under torchrun: two ranks save a checkpoint, each in a folder of
its own or both in the same.

Usage: checkpoint_worker.py FOLDER own|shared. Each rank writes to FOLDER/said_RANK what became of
the save."""

import sys
from pathlib import Path

import torch

from recipes.errors import CheckpointError
from trainers.core import checkpoint, distributed


class Part:
    """Stands where the policy engine stands: each rank writes a file."""

    adapted = ()

    def save_state(self, folder):
        file = folder / f"part_{distributed.rank()}"
        file.write_bytes(b"w")
        return [file]

    def save_model(self, folder, tokenizer, stop_ids):
        pass


def main(folder: Path, place: str) -> None:
    distributed.setup()
    name = f"run_{distributed.rank()}" if place == "own" else "run"
    try:
        checkpoint.save(folder / name, 2, Part(), None, (), {}, keep=2)
        said = "saved"
    except CheckpointError as error:
        said = str(error)
    (folder / f"said_{distributed.rank()}").write_text(said)
    # A rank that leaves while the other still talks to it would abort.
    distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
