"""A request to stop: SIGTERM or SIGUSR1, which a scheduler sends before it ends a job."""

from __future__ import annotations

import signal

from trainers.core import distributed

# As a shell gives it for a process that SIGTERM ended.
EXIT_STATUS = 143


class StopRequest:
    """From now on, until `close`, both signals are remembered and do not end this process."""

    def __init__(self):
        self.received = False
        numbers = (signal.SIGTERM, signal.SIGUSR1)
        self.before = {number: signal.signal(number, self._receive) for number in numbers}

    def close(self) -> None:
        """Give both signals back to what had them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, frame) -> None:
        self.received = True

    def agreed(self) -> bool:
        """Whether a rank has had a signal. A collective."""
        return any(distributed.gather(self.received))
