"""Run by test_state.py, alone or under torchrun: updates, a save, and updates after loading it.

Usage: state_worker.py MODEL FOLDER JOB …. A JOB is `zero1` or `zero1/bfloat16`: three updates, the
state saved after two; then another engine loads it and makes the third. Or it is `zero1<NAME`: an
engine loads FOLDER/NAME, of another process, and makes the third. Rank 0 prints a line of JSON for
each: the job, the losses of the third update, whether all weights are equal after it, and the sum
of their sizes."""

import json
import sys
from pathlib import Path

import torch

from recipes.compose import compose
from rollouts.trajectory import Trajectory
from trainers.core import distributed
from trainers.core.batching import pack
from trainers.core.deepspeed import PolicyEngine
from trainers.core.policy import load_policy


def loss(head, hidden, batch):
    logits = torch.nn.functional.linear(hidden, head.weight)
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets) / 2


class Job:
    """An engine, and updates of it on two sequences."""

    def __init__(self, model: str, form: str):
        stage, _, dtype = form.partition("/")
        self.device = distributed.setup()
        keys = [f"engine={stage}", f"model.dtype={dtype or 'float32'}", "train.weight_decay=0.1"]
        policy = load_policy(model, torch.float32, self.device)
        self.engine = PolicyEngine(policy, compose(["recipe=poweropd", *keys]))

    def update(self, number: int) -> float:
        """The loss of all ranks, which share two sequences."""
        losses = []
        sequences = distributed.shard_contiguous([[8, 9, 10], [11, 12, 13]])
        for place, tokens in enumerate(sequences):
            drawn = Trajectory(0, 0, [5, 6, 7 + number], tokens, "stop")
            drawn.annotations = {"mask": torch.ones(3, dtype=torch.bool).numpy()}
            value = self.engine.forward(pack([drawn], [0], self.device), loss)
            self.engine.backward(value, last=place == len(sequences) - 1)
            losses.append(float(value.detach()))
        self.engine.step(1e-2)
        return sum(sum(own) for own in distributed.gather(losses))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.weights()}


def main(model: str, folder: Path, jobs: list[str]) -> None:
    for text in jobs:
        form, _, source = text.partition("<")
        row = {"job": text}
        if not source:
            source = f"{form.replace('/', '_')}_{distributed.world_size()}"
            whole = Job(model, form)
            whole.update(0)
            whole.update(1)
            (folder / source).mkdir(exist_ok=True)
            whole.engine.save_state(folder / source)
            distributed.barrier()
            row["whole"] = whole.update(2)
            weights = whole.weights()
            whole.engine.close()
        resumed = Job(model, form)
        resumed.engine.load_state(folder / source)
        row["resumed"] = resumed.update(2)
        after = resumed.weights()
        if "whole" in row:
            row["equal"] = all(torch.equal(weights[name], after[name]) for name in weights)
        row["sum"] = sum(float(tensor.double().abs().sum()) for tensor in after.values())
        resumed.engine.close()
        if distributed.rank() == 0:
            print(json.dumps(row), flush=True)
    distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
