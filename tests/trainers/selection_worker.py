"""Run by test_onpolicy_sft.py, alone or under torchrun: one step of on-policy SFT on given samples.

Usage: selection_worker.py MODEL OUT SETTING …, a SETTING being `stage/normalizer/minibatches/kept`,
`kept` the indices of the kept samples joined with '-'. Rank 0 writes to OUT each setting's
gradients, one file per update, and the step's row with the number of updates and the changed
weights' count."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from recipes.compose import compose
from rollouts.trajectory import Trajectory
from trainers.core import distributed
from trainers.core.deepspeed import PolicyEngine
from trainers.core.policy import load_policy
from trainers.loop import Loop
from trainers.onpolicy_sft import OnPolicySFT

SAMPLES = 8


class Recorded(PolicyEngine):
    def step(self, lr):
        self.recorded.append(
            {
                name: safe_get_full_grad(p).float().cpu().numpy()
                for name, p in self.policy.named_parameters()
            }
        )
        return super().step(lr)


class Given(OnPolicySFT):
    def draw(self, step):
        rng = np.random.default_rng(0)
        drawn = [
            Trajectory(
                i // 2,
                i % 2,
                rng.integers(3, 400, 5).tolist(),
                rng.integers(3, 400, int(rng.integers(2, 30))).tolist(),
                "stop",
            )
            for i in range(SAMPLES)
        ]
        for index, trajectory in enumerate(drawn):
            trajectory.reward = trajectory.score = float(index in self.kept)
        return drawn


def weights(engine):
    return torch.cat(
        [safe_get_full_fp32_param(p).flatten().float().cpu() for p in engine.policy.parameters()]
    )


def main(model: str, out: str, settings: list[str]) -> None:
    device = distributed.setup()
    for setting in settings:
        stage, normalizer, minibatches, kept = setting.split("/")
        config = compose(
            [
                "recipe=onpolicy_sft",
                f"engine={stage}",
                f"train.normalizer={normalizer}",
                "train.max_grad_norm=0",
                f"train.minibatches={minibatches}",
                "train.prompts_per_step=4",
                "rollout.samples_per_prompt=2",
                "train.lr=1e-3",
                "train.tokens_per_microbatch=40",
            ]
        )
        loop = object.__new__(Loop)  # the parts that a step needs
        loop.config = config
        loop.run = SimpleNamespace(device=device, rollout=None)
        loop.engine = Recorded(load_policy(model, torch.float32, device), config)
        loop.engine.recorded, said = [], []
        loop.trainer = Given(SimpleNamespace(config=config, vocab=None))
        loop.trainer.kept = [int(index) for index in kept.split("-") if index]
        loop.loss, loop.tracker = loop.trainer.loss(), SimpleNamespace(say=said.append)
        before = weights(loop.engine)
        row, _ = loop.step(1)
        changed = int((weights(loop.engine) != before).sum())
        if distributed.rank() == 0:
            name = f"{setting.replace('/', '_')}_{distributed.world_size()}"
            for index, gradients in enumerate(loop.engine.recorded):
                np.savez(Path(out) / f"{name}_{index}.npz", **gradients)
            (Path(out) / f"{name}.json").write_text(
                json.dumps(row | {"changed": changed, "said": said})
            )
        loop.engine.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
