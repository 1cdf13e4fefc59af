"""Run by test_watchdog.py: ranks as plain processes that share a store, without torchrun.

Usage: watchdog_worker.py. Each scenario is two forks of this process, which has loaded torch
already. Prints a line of JSON for each: the exit statuses, the seconds, and what ranks wrote."""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist

from recipes.errors import TrainingError
from trainers.core import failures, peers, watchdog


class Deadline:
    """Minutes."""

    def __init__(self, **seconds: float):
        self.seconds = seconds

    def phases(self) -> dict[str, float]:
        return {name: seconds / 60 for name, seconds in self.seconds.items()}


def stalled_in_an_earlier_phase(rank: int) -> None:
    with watchdog.phase("rollout", 3):
        if rank == 1:
            time.sleep(60)
    with watchdog.phase("update"), watchdog.waiting("gather"):
        time.sleep(60)


def stalled_in_the_same_phase(rank: int) -> None:
    with watchdog.phase("rollout", 3):
        if rank == 0:
            time.sleep(60)
        with watchdog.waiting("gather"):
            time.sleep(60)


def failed(rank: int) -> None:
    with watchdog.phase("update", 4):
        if rank == 0:
            raise TrainingError("step 4: not finite")
        time.sleep(60)


def killed(rank: int) -> None:
    with watchdog.phase("update", 5):
        if rank == 1:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def late_to_leave(rank: int) -> None:
    """Rank 0, which holds the store, is ready first."""
    with watchdog.phase("report", 6):
        time.sleep(3 * rank)


SCENARIOS = {
    stalled_in_an_earlier_phase: {"rollout": 2, "update": 4},
    stalled_in_the_same_phase: {"rollout": 2},
    failed: {"update": 30},
    killed: {"update": 30},
    late_to_leave: {"report": 30},
}


def work(rank: int, scenario, port: int) -> int:
    def say(error: Exception) -> None:
        print(f"error: {error}", file=sys.stderr, flush=True)

    if rank == 0:
        # As the process group does.
        server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        assert server
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    try:
        with failures.watched(Deadline(**SCENARIOS[scenario]), say) as dog:
            peers.connect(dog, rank, 2)
            scenario(rank)
    except TrainingError as error:
        say(error)
        return 1
    return 0


def start(rank: int, scenario, port: int, output: Path) -> int:
    child = os.fork()
    if child == 0:
        with output.open("w") as file:
            os.dup2(file.fileno(), 2)
        os._exit(work(rank, scenario, port))
    return child


def main() -> None:
    peers.EVERY, peers.GRACE, watchdog.GRACE = 0.3, 1.0, 3.0
    with tempfile.TemporaryDirectory() as folder:
        # Side by side: they mostly wait.
        begun = [begin(scenario, Path(folder)) for scenario in SCENARIOS]
        for scenario, started, children, outputs in begun:
            statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            row = {
                "scenario": scenario.__name__,
                "pids": children,
                "statuses": statuses,
                "seconds": time.monotonic() - started,
                "outputs": [output.read_text() for output in outputs],
            }
            print(json.dumps(row), flush=True)


def begin(scenario, folder: Path) -> tuple:
    """Start both ranks of a scenario: it, when, their process ids, and the files of their words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"{scenario.__name__}_{rank}" for rank in range(2)]
    started = time.monotonic()
    children = [start(rank, scenario, port, out) for rank, out in enumerate(outputs)]
    return scenario, started, children, outputs


if __name__ == "__main__":
    main()
