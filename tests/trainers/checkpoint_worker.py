"""Run by test_checkpoint.py under torchrun: two ranks save a checkpoint, each in a folder of
its own or both in the same, and then choose the one to continue from.

Usage: checkpoint_worker.py FOLDER own|shared. Each rank writes JSON to FOLDER/said_RANK: what
became of the save, of a resume, and, in one folder, of a resume when the newest is damaged."""

import json
import sys
from pathlib import Path

import torch

from recipes.compose import compose
from recipes.errors import CheckpointError
from trainers.core import checkpoint, distributed
from trainers.core.rundir import run_directory


class Part:
    """Stands where the policy engine stands: each rank writes a file."""

    adapted = ()

    def save_state(self, folder):
        file = folder / f"part_{distributed.rank()}"
        file.write_bytes(b"w")
        return [file]

    def save_model(self, folder, tokenizer, stop_ids):
        pass


def saved(run: Path, step: int) -> str:
    try:
        return checkpoint.save(run, step, Part(), None, (), {}, keep=2).name
    except CheckpointError as error:
        return str(error)


def chosen(run: Path) -> list:
    messages = []
    try:
        _, point, start = run_directory(compose([f"run.dir={run}", "resume=auto"]), {}, messages)
        return [point.name, start, messages]
    except CheckpointError as error:
        return [str(error)]


def main(folder: Path, place: str) -> None:
    distributed.setup()
    rank = distributed.rank()
    run = folder / (f"run_{rank}" if place == "own" else "run")
    said = [saved(run, 2)]
    if place == "own":
        (run / "checkpoints" / f"step_{rank + 1}").mkdir(parents=True)
        said.append(chosen(run))
    else:
        said.append(chosen(run))
        newest = run / "checkpoints" / saved(run, 4)
        if rank == 0:
            (newest / "state" / "part_1").write_bytes(b"x")
        distributed.barrier()
        said.append(chosen(run))
    (folder / f"said_{rank}").write_text(json.dumps(said))
    # A rank that leaves while the other still talks to it would abort.
    distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
