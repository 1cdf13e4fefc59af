"""Run by test_update.py, alone or under torchrun: the gradient of one PowerOPD step under several
settings.

Usage: gradient_worker.py MODEL OUT SETTING …, a SETTING being `stage/budget/order/normalizer`. Rank
0 writes each setting's gradients, gradient norm and loss to OUT/<setting>.npz."""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from recipes.compose import compose
from rewards.token import Power
from rollouts.trajectory import Trajectory
from trainers.core import distributed
from trainers.core.batching import assign, empty_like, make_microbatches, pack
from trainers.core.deepspeed import PolicyEngine
from trainers.core.policy import load_policy
from trainers.losses import Loss


def trajectories() -> list[Trajectory]:
    rng = np.random.default_rng(0)
    made = []
    for index in range(13):
        completion = rng.integers(3, 400, int(rng.integers(1, 40))).tolist()
        made.append(
            Trajectory(
                index,
                0,
                rng.integers(3, 400, int(rng.integers(1, 20))).tolist(),
                completion,
                "stop",
            )
        )
        made[-1].annotations = {
            "mask": rng.random(len(completion)) > 0.3,
            "teacher_logprobs": np.log(rng.random(len(completion))).astype(np.float32),
        }
    return made


def bucket_sizes(optimizer) -> list[int]:
    """The elements of the buffers that DeepSpeed reduces gradients in."""
    found = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    buffers = [b for buffer in found for b in (buffer if isinstance(buffer, list) else [buffer])]
    return [len(buffer) for buffer in buffers if buffer is not None]


def main(model: str, out: str, settings: list[str]) -> None:
    device = distributed.setup()
    for setting in settings:
        stage, budget, order, normalizer = setting.split("/")
        config = compose(
            [f"engine={stage}", f"train.normalizer={normalizer}", "train.max_grad_norm=0"]
        )
        policy = load_policy(model, torch.float32, device)
        count = sum(parameter.numel() for parameter in policy.parameters())
        engine = PolicyEngine(policy, config)
        drawn = trajectories()
        if order == "reversed":
            drawn = drawn[::-1]
        mine = [
            drawn[i]
            for i in assign([t.length for t in drawn], distributed.world_size())[distributed.rank()]
        ]
        groups = make_microbatches([t.length for t in mine], int(budget))
        total = float(sum(t.annotations["mask"].sum() for t in drawn))
        loss = Loss(policy_gradient=True, reward=Power(config.reward))
        rounds, loss_sum, batch = max(distributed.gather(len(groups))), 0.0, None
        for index in range(rounds):
            batch = pack(mine, groups[index], device) if index < len(groups) else empty_like(batch)
            output = engine.forward(
                batch,
                functools.partial(loss, denominator=total),
            )
            engine.backward(output["loss"], last=index == rounds - 1)
            loss_sum += float(output["loss"].detach())
        # A GPU gives a bucket its memory as a whole.
        assert all(size <= count for size in bucket_sizes(engine.engine.optimizer)), setting
        # ZeRO keeps the mean over ranks, which backward() turned into the sum.
        gradients = {
            name: safe_get_full_grad(p).float().cpu().numpy()
            for name, p in engine.policy.named_parameters()
        }
        norm = engine.step(1e-3)
        loss_sum = sum(distributed.gather(loss_sum))
        if distributed.rank() == 0:
            np.savez(
                Path(out) / f"{setting.replace('/', '_')}_{distributed.world_size()}.npz",
                norm=norm,
                loss=loss_sum,
                **gradients,
            )
        engine.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
