"""Run by test_safety.py, alone or under torchrun: an update with NaN between two that are finite.

Usage: nonfinite_worker.py MODEL STAGE …, a STAGE being `zero1` or `zero1/bfloat16`. Rank 0 prints a
line of JSON for each: the three norms, and whether the weights moved at each update."""

import json
import math
import sys

import torch

from recipes.compose import compose
from rollouts.trajectory import Trajectory
from trainers.core import distributed
from trainers.core.batching import pack
from trainers.core.deepspeed import PolicyEngine
from trainers.core.policy import load_policy


def nan_gradient(head, hidden, batch):
    return (hidden * math.nan).sum()


def infinite_loss(head, hidden, batch):
    """Its gradient is finite."""
    return hidden.square().mean() + torch.inf


def finite(head, hidden, batch):
    return hidden.square().mean()


def main(model: str, stages: list[str]) -> None:
    device = distributed.setup()
    for stage in stages:
        engine, _, dtype = stage.partition("/")
        keys = [f"engine={engine}", f"model.dtype={dtype or 'float32'}"]
        config = compose(["recipe=poweropd", *keys])
        policy = PolicyEngine(load_policy(model, torch.float32, device), config)
        drawn = Trajectory(0, 0, [5, 6, 7], [8, 9, 10], "stop")
        drawn.annotations = {"mask": torch.ones(3, dtype=torch.bool).numpy()}
        batch = pack([drawn], [0], device)
        norms, moved = [], []
        before = weights(policy)
        for function in (finite, nan_gradient, infinite_loss, finite):
            # One rank's alone is wrong.
            own = function if distributed.rank() == distributed.world_size() - 1 else finite
            policy.backward(policy.forward(batch, own), last=True)
            norms.append(policy.step(1e-3))
            after = weights(policy)
            moved.append(any(not torch.equal(before[name], after[name]) for name in after))
            before = after
        if distributed.rank() == 0:
            print(json.dumps({"stage": stage, "norms": norms, "moved": moved}), flush=True)
        policy.close()


def weights(policy: PolicyEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.weights()}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
