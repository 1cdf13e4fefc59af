"""Which implementation answers on which device. The torch one is the specification and the CPU path."""

import torch

BACKENDS = ("auto", "torch")
_selected = "auto"


def set_backend(name: str) -> None:
    """Select the implementation for every later call: `auto` (the fastest one the device has) or `torch`.

    Raises ValueError for another name.
    """
    global _selected
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    _selected = name


def active_backend(device: torch.device | str) -> str:
    """The implementation that a call on `device` uses under the current selection."""
    torch.device(device)  # an unknown device is an error here, not later
    return "torch" if _selected == "auto" else _selected
