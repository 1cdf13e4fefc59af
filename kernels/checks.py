"""Argument checks of the public functions: one line naming the argument, what it got and what it
expects."""

import math

import torch
from torch import Tensor

_KINDS = {
    "float": lambda t: t.is_floating_point(),
    "int64": lambda t: t.dtype == torch.int64,
    "bool or uint8": lambda t: t.dtype in (torch.bool, torch.uint8),
}


class Shapes:
    """Checks one call's tensors against each other.

    A letter has one size, and all tensors share a device.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.owner: dict[str, str] = {}
        self.device: torch.device | None = None

    def check(
        self,
        name: str,
        value: Tensor | None,
        dims: str,
        kind: str = "float",
        optional: bool = False,
    ) -> None:
        """One tensor's type, dtype, shape and device.

        dims: one letter per dimension, e.g. "TH"; a letter's first use fixes its size. kind: a key
        of _KINDS.
        """
        if value is None and optional:
            return
        wanted = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} tensor [{', '.join(dims)}]"
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
        if not _KINDS[kind](value):
            raise TypeError(f"{name} must be {wanted}, got dtype {value.dtype}")
        if value.ndim != len(dims):
            raise ValueError(f"{name} must be {wanted}, got shape {list(value.shape)}")
        self._check_sizes(name, value, dims, wanted)
        if self.device is None:
            self.device = value.device
        elif value.device != self.device:
            raise ValueError(
                f"{name} must be on {self.device} like the first tensor, got {value.device}"
            )

    def _check_sizes(self, name: str, value: Tensor, dims: str, wanted: str) -> None:
        for letter, size in zip(dims, value.shape):
            if self.sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{name} must be {wanted} with {letter}={self.sizes[letter]} as in "
                    f"{self.owner[letter]}, got shape {list(value.shape)}"
                )
            self.owner.setdefault(letter, name)

    def ids(self, name: str, value: Tensor, dims: str, active: Tensor, vocab: int) -> None:
        """int64 ids, each within [0, vocab) at the active tokens; others may be anything."""
        self.check(name, value, dims, "int64")
        # On a GPU this waits for the device, some tens of microseconds; a graph being captured
        # cannot wait.
        if value.device.type == "cpu" or not torch.cuda.is_current_stream_capturing():
            live = value.index_select(0, active)
            if live.numel() and not (live.min() >= 0 and live.max() < vocab):
                raise IndexError(
                    f"{name} must lie in [0, {vocab}) (the valid vocabulary) at every unmasked "
                    f"row, got {live.min().item()}..{live.max().item()}"
                )


def check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_number(
    name: str,
    value: object,
    low: float = 0.0,
    high: float = math.inf,
    *,
    strict: bool = True,
    optional: bool = False,
) -> None:
    """A finite number above `low` (or equal to it where not `strict`) and at most `high`."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < low or value > high or (strict and value == low):
        above = "above" if strict else "at least"
        below = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name} must be finite, {above} {low:g}{below}, got {value}")


def check_denominator(value: object) -> None:
    """A positive number or 0-dim tensor.

    A tensor's value is read on the CPU only: on a GPU that would stall.
    """
    check_scale("denominator", value)
    if not (isinstance(value, Tensor) and value.device.type != "cpu") and not value > 0:
        raise ValueError(
            f"denominator must be above 0 (give an empty window 1), got {float(value)}"
        )


def check_scale(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(
                f"{name} must be a number or a 0-dim tensor, got shape {list(value.shape)}"
            )
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a 0-dim tensor, got {type(value).__name__}")


def check_count(name: str, value: object, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 1 <= value <= high:
        raise ValueError(f"{name} must lie in [1, {high}], got {value}")


def check_vocab(valid_vocab_size: int | None, *sizes: int) -> int:
    """The number of columns that take part; required where the given vocabularies differ."""
    if valid_vocab_size is None:
        if min(sizes) != max(sizes):
            raise ValueError(
                "valid_vocab_size must be given where the vocabularies differ, got None with "
                f"V={sizes[0]} and V={sizes[1]}"
            )
        return sizes[0]
    check_count("valid_vocab_size", valid_vocab_size, min(sizes))
    return valid_vocab_size
