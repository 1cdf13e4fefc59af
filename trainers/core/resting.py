"""Frozen weights that lie on the CPU between uses."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Resting:
    """A frozen module whose weights are on the device while it scores, and else on the CPU.

    Those on the CPU stay there, as nothing changes them. Where the device is the CPU, nothing is
    moved.

    Args:
        module: on the device.
        device: where it scores.
        staying: tensors of it that stay on the device.
    """

    def __init__(
        self, module: torch.nn.Module, device: torch.device, staying: Iterable[torch.Tensor] = ()
    ):
        self.device = device
        stay = {id(tensor) for tensor in staying}
        tensors = [t for t in (*module.parameters(), *module.buffers()) if id(t) not in stay]
        self.kept = [(tensor, self._on_cpu(tensor.data)) for tensor in tensors]
        self.rest()

    def _on_cpu(self, data: torch.Tensor) -> torch.Tensor:
        # A copy from pinned memory is several times as fast.
        return data.cpu().pin_memory() if self.device.type == "cuda" else data.cpu()

    def __enter__(self) -> None:
        for tensor, data in self.kept:
            tensor.data = data.to(self.device, non_blocking=True)

    def __exit__(self, *_) -> None:
        self.rest()

    def rest(self) -> None:
        """Leave the device."""
        for tensor, data in self.kept:
            tensor.data = data
