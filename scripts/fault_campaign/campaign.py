"""Deals the recipes out to processes, one per core; each forks the runs of its recipes."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from scripts.fault_campaign import cells, disk, processes, runs
from scripts.fault_campaign.cells import Cell, Subject, Wrong

PACKAGES = ("trainers.loop", "trainers.prepare", "deepspeed", "transformers", "scripts.report")
Pair = tuple[str, tuple[str, ...]]


@dataclass
class Worker:
    """A process with its core and the connection to it."""

    process: multiprocessing.process.BaseProcess
    connection: Connection


def campaign(pairs: Sequence[Pair], folder: Path, jobs: int) -> Iterator[Cell]:
    """The cells of each recipe and its faults, as they are finished.

    Args:
        pairs: recipes, each with the names of its faults.
        folder: the runs' place; those of cells that are not good stay there.
        jobs: the number of processes, each on a core.

    Raises:
        RuntimeError: a process ended before its recipe was done.
    """
    load(folder)
    context = multiprocessing.get_context("fork")
    cores = sorted(os.sched_getaffinity(0))
    waiting, workers = list(pairs), []
    for number in range(min(jobs, len(waiting))):
        here, there = context.Pipe()
        core = cores[number % len(cores)]
        process = context.Process(target=serve, args=(there, folder, core), daemon=True)
        process.start()
        there.close()
        workers.append(Worker(process, here))
        here.send(waiting.pop(0))
    while workers:
        for ready in wait([worker.connection for worker in workers]):
            worker = next(worker for worker in workers if worker.connection is ready)
            try:
                answer = worker.connection.recv()
            except EOFError:
                raise RuntimeError("a process of the campaign ended before its work") from None
            if answer is not None:
                yield answer
                continue
            if waiting:
                worker.connection.send(waiting.pop(0))
            else:
                worker.connection.send(None)
                workers.remove(worker)


def serve(connection: Connection, folder: Path, core: int) -> None:
    """A process of the campaign: judge recipe after recipe, until None comes."""
    os.sched_setaffinity(0, {core})
    disk.private_mounts()
    while (pair := connection.recv()) is not None:
        recipe, faults = pair
        for cell in judged(recipe, faults, folder / recipe):
            connection.send(cell)
        connection.send(None)


def judged(recipe: str, faults: Sequence[str], folder: Path) -> Iterator[Cell]:
    """The cells of a recipe."""
    subject = Subject(recipe, folder)
    try:
        subject.uninterrupted()
    except Wrong as wrong:
        yield Cell(recipe, "uninterrupted", verdict="lost", detail=wrong.detail)
        return
    for fault in faults:
        try:
            yield cells.judge(subject, fault)
        except Exception as error:  # of the campaign itself; the other cells go on
            detail = "".join(traceback.format_exception_only(error)).strip()
            yield Cell(recipe, fault, verdict="not judged", detail=detail)


def load(folder: Path) -> None:
    """Import all that a run imports, so that forked runs start at once.

    A first run says what that is. No thread may be there before a fork.
    """
    for name in PACKAGES:
        importlib.import_module(name)
    names = folder / "modules"
    log = folder / "first"

    def first() -> None:
        keys = Subject("poweropd", folder / "first_run").keys
        sys.argv = ["train.py", *keys, "train.steps=1", f"run.dir={folder / 'first_run' / 'run'}"]
        import train

        status = train.main(sys.argv[1:])
        names.write_text("\n".join(sorted(sys.modules)))
        os._exit(status)

    ended = processes.start(first, log).wait(runs.DEADLINE)
    if ended.status or ended.hung:
        raise RuntimeError(f"the first run failed ({ended.how}): {ended.error[-2000:]}")
    for name in names.read_text().split():
        if name not in sys.modules and not name.startswith("__"):
            try:
                importlib.import_module(name)
            except Exception:
                continue  # a module that only its package can import
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        raise RuntimeError(f"{threads} threads are there before the first fork")
