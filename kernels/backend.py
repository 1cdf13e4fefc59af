"""Which implementation answers on which device.

The torch one is the specification and the CPU path.
"""

import functools
import importlib.util
import os

import torch

BACKENDS = ("auto", "triton", "torch")
_selected = "auto"


def set_backend(name: str) -> None:
    """Select the implementation for every later call: `auto` (the fastest one the device has),
    `triton`, `torch`.

    Raises ValueError for another name.
    """
    global _selected
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    _selected = name


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1 before the
    first import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def active_backend(device: torch.device | str) -> str:
    """The implementation that a call on `device` uses under the current selection.

    A run on a GPU also computes rewards of tokens on the CPU, by torch.

    Raises ValueError: `triton` was selected and cannot run on this machine.
    """
    device = torch.device(device)
    if _selected == "torch":
        return "torch"
    runs = device.type == "cuda" or (interpreted() and device.type == "cpu")
    if _selected == "auto":
        return "triton" if device.type == "cuda" and _installed() else "torch"
    if not runs and torch.cuda.is_available():
        return "torch"
    if not runs:
        raise ValueError(
            f"backend triton needs an NVIDIA GPU (or TRITON_INTERPRET=1, a slow check), got "
            f"{device.type}; take auto or torch"
        )
    if not _installed():
        raise ValueError(
            "backend triton needs the package triton, which is not installed; take auto or torch"
        )
    return "triton"


def use_triton(tensor: torch.Tensor) -> bool:
    return active_backend(tensor.device) == "triton"
