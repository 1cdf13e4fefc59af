"""The rollout engine that a config names."""

from __future__ import annotations

import torch

from recipes.components import ENGINES
from rollouts.engines.base import Engine


def make_engine(
    config, device: torch.device, dtype: torch.dtype, max_length: int, path: str | None = None
) -> Engine:
    """`rollout.engine` with the weights of a model.

    Args:
        config: the run's.
        device: where it samples.
        dtype: of its weights.
        max_length: the longest sequence, in tokens.
        path: a model folder or hub name; None: `model.path`.
    """
    engine = ENGINES.resolve(config.rollout.engine)
    return engine(path or config.model.path, config, device, dtype, max_length=max_length)
