"""Moves the trainer's weights into the rollout engine, and proves that every tensor arrived.

The proof is a fingerprint: a checksum of a tensor's bits that is cheap, exact, and computable on
both sides of the sync.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from recipes.errors import SyncError

Weights = Iterator[tuple[str, Tensor]]

COLUMNS = 64  # input columns of a matrix that are compared
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def sync_weights(engine, weights: Callable[[], Weights], salt: int) -> None:
    """Send every tensor, and compare fingerprints on both sides.

    Args:
        engine: a rollout engine (rollouts/engines/base.py).
        weights: yields (checkpoint name, full tensor in the engine's dtype), gathering bucket by
            bucket where parameters are sharded. It is a collective: every rank calls it together.
        salt: decides which columns are compared; the step.

    Raises:
        SyncError: a tensor in the engine differs from the trainer's, or is missing there. The error
            names such tensors.
    """
    expected: dict[str, int] = {}

    def recorded() -> Weights:
        for name, tensor in weights():
            expected[name] = fingerprint(tensor, name, salt)
            yield name, tensor

    sent = recorded()
    engine.load_weights(sent)
    # What the engine did not ask for is checked too.
    for _ in sent:
        pass
    verify(engine, expected, salt)


def verify(engine, expected: dict[str, int], salt: int) -> None:
    """Raise a `SyncError` that names the tensors whose fingerprint in the engine is another."""
    actual = engine.fingerprints(list(expected), salt)
    wrong = [name for name, value in expected.items() if actual[name] != value]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise SyncError(
            f"after the weight sync of step {salt} the rollout engine's "
            f"{', '.join(wrong[:3])}{more} differs from the trainer's; "
            "its samples would come from stale weights"
        )


def fingerprint(tensor: Tensor, name: str, salt: int) -> int:
    """The fingerprint of parameter `name`.

    A vector enters whole, a matrix [out, in] by its sampled input columns.
    """
    if tensor.dim() == 2:
        columns = sampled_columns(name, tensor.shape[1], salt)
        tensor = tensor[:, columns.to(tensor.device)]
    return checksum(tensor)


def sampled_columns(name: str, width: int, salt: int) -> Tensor:
    """The input columns of a matrix that are compared.

    Up to 64 columns are all compared. Of more, a seeded choice of 64 moves with `salt`. A GEMM
    engine may hold a matrix in a packed layout, which only a multiplication can read. Some columns
    of every row keep that cheap, and over the steps every column has its turn.
    """
    if width <= COLUMNS:
        return torch.arange(width)
    digest = hashlib.blake2b(f"{name}/{salt}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(width, generator=generator)[:COLUMNS].sort().values


def checksum(tensor: Tensor) -> int:
    """A position-weighted sum of the tensor's bits, modulo 2^64. The shape does not enter."""
    flat = tensor.detach().contiguous().reshape(-1)
    # -0.0 becomes 0.0: a packed matrix read back by multiplication cannot keep the sign of zero.
    flat = flat + 0
    bits = flat.view(_BITS[flat.element_size()]).to(torch.int64)
    weight = torch.arange(1, bits.numel() + 1, device=bits.device)
    # A linear congruential step, which wraps.
    weight = weight * -7046029254386353131 + 1442695040888963407
    weight = weight | 1
    return int((bits * weight).sum())
