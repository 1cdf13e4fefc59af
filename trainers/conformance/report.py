"""Cases, the comparison of two gradients, and the table of what agrees and what differs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative to the size of what is expected. Everything is float64.
EXACT = 1e-9
# Where an annotation is float32 in training too, as advantages are.
SINGLE = 1e-6


class Difference(Exception):
    """A component does something else than it states; the message has the numbers."""


@dataclass(frozen=True)
class Case:
    """One property of one component.

    Attributes:
        component: `key=name`, as a config selects it.
        property: a row of the table in docs/conformance.md.
        setting: other keys of the case, for the report.
        check: raises a `Difference`.
    """

    component: str
    property: str
    setting: str
    check: Callable[[], None]


@dataclass(frozen=True)
class Result:
    """What came of a case; `difference` is empty where it agreed."""

    case: Case
    difference: str

    def line(self) -> str:
        case = self.case
        name = f"{case.component:<32} {case.property:<24} {case.setting:<40}"
        return f"{name} {self.difference or 'ok'}"


def agree(ours: Tensor, stated: Tensor, tolerance: float = EXACT, what: str = "gradient") -> None:
    """Raise a `Difference` unless two tensors agree.

    Args:
        ours: what the component does.
        stated: what it must be.
        tolerance: of the norm of the difference, relative to that of `stated`.
        what: for the message.
    """
    if not torch.isfinite(ours).all():
        raise Difference(f"{what} is not finite")
    size = float(stated.norm())
    error = float((ours - stated).norm())
    if error <= tolerance * max(size, 1e-6):
        return
    if size == 0:
        raise Difference(f"{what} must be 0, its size is {float(ours.norm()):.3g}")
    raise Difference(
        f"{what} differs by {error / size:.3g} of its size: cosine {cosine(ours, stated):.6f}, "
        f"size {float(ours.norm()) / size:.6g} times the stated one"
    )


def vanish(ours: Tensor, scale: float, tolerance: float = SINGLE, what: str = "gradient") -> None:
    """Raise a `Difference` unless a tensor is 0, compared with what its size usually is."""
    if not torch.isfinite(ours).all():
        raise Difference(f"{what} is not finite")
    size = float(ours.norm())
    if size > tolerance * scale:
        raise Difference(f"{what} must be 0, its size is {size:.3g} (usually {scale:.3g})")


def cosine(one: Tensor, other: Tensor) -> float:
    """The cosine of the angle between two flat tensors; 0 where one of them is 0."""
    sizes = one.norm() * other.norm()
    return float(one @ other / sizes) if sizes else 0.0


def require(condition: bool, difference: str) -> None:
    """Raise a `Difference` unless the condition holds."""
    if not condition:
        raise Difference(difference)


def run(case: Case) -> Result:
    """Check one case. Whatever a component raises is a difference, so the others still run."""
    try:
        case.check()
    except Difference as difference:
        return Result(case, str(difference))
    except Exception as error:
        message = " ".join(str(error).split())
        return Result(case, f"raised {type(error).__name__}: {message}"[:300])
    return Result(case, "")


def run_all(
    cases: Iterable[Case], show: Callable[[str], None] = lambda line: None
) -> tuple[list[Result], float]:
    """Check cases in order, and show a line for each.

    Returns:
        the results, and the seconds that they took.
    """
    started = time.perf_counter()
    results = []
    for case in cases:
        results.append(run(case))
        show(results[-1].line())
    return results, time.perf_counter() - started


def summary(results: Sequence[Result], seconds: float) -> str:
    """How many cases there were, and how many differed."""
    failed = sum(bool(result.difference) for result in results)
    components = len({result.case.component for result in results})
    return (
        f"{len(results)} cases of {components} components in {seconds:.1f} s: "
        f"{len(results) - failed} ok, {failed} differ"
    )
