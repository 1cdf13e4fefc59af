"""How far a long phase is: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from trainers.core import watchdog

# Seconds between lines where there is no terminal.
EVERY = 5.0


class Progress:
    """Counts what is finished of `total`. Use it with `with`.

    Args:
        what: the phase, as `eval step 0`.
        total: the number of units.
        unit: the unit, as `completions`.
        shown: False on ranks that print nothing.
    """

    def __init__(self, what: str, total: int, unit: str, shown: bool = True):
        self.what, self.total, self.unit = what, total, unit
        self.finished = 0
        self.started = self.said = time.monotonic()
        self.shown = shown
        self.bar: tqdm | None = None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(
                total=total, desc=what, unit=f" {unit}", leave=False, dynamic_ncols=True
            )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, count: int = 1) -> None:
        """Count more units as finished, and show it when it is time."""
        self.finished += count
        # A line comes every few seconds, or the bar moves.
        watchdog.heard()
        if self.bar is not None:
            self.bar.update(count)
        elif self.shown and time.monotonic() - self.said > EVERY and self.finished < self.total:
            self.said = time.monotonic()
            left = (self.said - self.started) * (self.total - self.finished) / self.finished
            print(
                f"{self.what}  {self.finished} of {self.total} {self.unit}, {clock(left)} left",
                file=sys.stderr,
                flush=True,
            )


def clock(seconds: float) -> str:
    """Minutes and seconds, as `1:05`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
