"""Moves the trainer's weights into the rollout engine, then proves on every tensor that they
arrived."""

from __future__ import annotations

from typing import Callable, Iterator

import torch

from recipes.errors import SyncError
from rollouts.fingerprint import fingerprint

Weights = Iterator[tuple[str, torch.Tensor]]


def sync_weights(engine, weights: Callable[[], Weights], salt: int) -> None:
    """Send every tensor, and compare fingerprints on both sides.

    Args:
        engine: a rollout engine.
        weights: yields (checkpoint name, full tensor in the engine's dtype), gathering bucket by
            bucket where parameters are sharded. It is a collective: every rank calls it together.
        salt: which columns are compared; the step.

    Raises:
        SyncError: a tensor in the engine differs from the trainer's, or is not there; all such are
            named.
    """
    expected: dict[str, int] = {}

    def recorded() -> Weights:
        for name, tensor in weights():
            expected[name] = fingerprint(tensor, name, salt)
            yield name, tensor

    sent = recorded()
    engine.load_weights(sent)
    for _ in sent:  # what the engine did not ask for is checked too
        pass
    verify(engine, expected, salt)


def verify(engine, expected: dict[str, int], salt: int) -> None:
    """Raise a `SyncError` that names the tensors whose fingerprint in the engine is not the
    expected one."""
    held = engine.fingerprints(list(expected), salt)
    wrong = [name for name, value in expected.items() if held[name] != value]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise SyncError(
            f"after the weight sync of step {salt} the rollout engine's {', '.join(wrong[:3])}{more} "
            "differs from the trainer's; its samples would come from stale weights"
        )
