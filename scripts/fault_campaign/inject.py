"""Brings a fault into a run: named functions of the library are wrapped in the run's process.

The library has no hooks for it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

YEAR = 365 * 86400.0
# Bytes that a file may have where no disk can be filled.
SMALL_FILES = 100_000
# Files of a cell: the fault has happened; a paused run goes on.
FIRED, GO = "fired", "go"
# Bytes that stay free on a full disk.
REST = 100_000


@dataclass
class Scene:
    """The run that a fault is brought into.

    Attributes:
        step: the step that the fault belongs to.
        folder: of the cell.
        now: the step that the run is at.
        loop: its `Loop`.
    """

    step: int
    folder: Path
    now: int = 0
    loop: Any = None

    @property
    def disk(self) -> Path:
        """Where the run writes."""
        return self.folder / "disk"


Action = Callable[[Scene], None]


def bring(scene: Scene, place: str, action: Action, before: bool) -> None:
    """Wrap the function of a place in this process. The action happens once, at the scene's step.

    Args:
        scene: of the run.
        place: a key of `PLACES`.
        action: what happens.
        before: before the function does its work, not after it.
    """
    from trainers.loop import Loop

    build, step = Loop.__init__, Loop.step

    def built(loop, *args, **kwargs):
        build(loop, *args, **kwargs)
        scene.loop = loop
        owner, name, chosen = PLACES[place](loop)
        wrap(scene, owner, name, chosen, action, before)

    def stepped(loop, number: int):
        scene.now = number
        return step(loop, number)

    Loop.__init__, Loop.step = built, stepped


def wrap(scene: Scene, owner, name: str, chosen: Callable, action: Action, before: bool) -> None:
    original = getattr(owner, name)
    done = False

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        nonlocal done
        due = not done and scene.now == scene.step and chosen(*args)
        if due and before:
            done = True
            (scene.folder / FIRED).touch()
            action(scene)
        result = original(*args, **kwargs)
        if due and not before:
            done = True
            (scene.folder / FIRED).touch()
            action(scene)
        return result

    setattr(owner, name, wrapped)


def _always(*args) -> bool:
    return True


def _module(name: str):
    import importlib

    return importlib.import_module(name)


# Of each place: whose function it is, its name, and for which arguments.
PLACES: dict[str, Callable[[Any], tuple[Any, str, Callable[..., bool]]]] = {
    "rollout": lambda loop: (loop.trainer, "draw", _always),
    "annotate": lambda loop: (loop.trainer, "annotate", _always),
    "update": lambda loop: (loop.engine, "backward", _always),
    "pack": lambda loop: (_module("trainers.core.updates"), "pack", _always),
    "optimizer": lambda loop: (loop.engine, "step", _always),
    "sync": lambda loop: (loop.run.rollout, "load_weights", _always),
    "record": lambda loop: (_module("trainers.core.tracking").Tracker, "step", _always),
    "saving": lambda loop: (loop, "save", _always),
    "save": lambda loop: (loop.engine, "save_model", _always),
    "rename": lambda loop: (Path, "rename", lambda path, _: path.name.endswith(".partial")),
    "remove": lambda loop: (shutil, "rmtree", lambda path, *_: path.name.endswith(".removed")),
    "evaluate": lambda loop: (_module("trainers.evaluation"), "verifier_scores", _always),
    "vllm": lambda loop: (loop.run.rollout.llm.llm_engine, "step", _always),
    "finish": lambda loop: (loop.trainer, "after_training", _always),
}


def kill(scene: Scene) -> None:
    """The process is killed: SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(scene: Scene) -> None:
    """A scheduler asks for an end: SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)


def stall(scene: Scene) -> None:
    """The phase never ends."""
    while True:
        time.sleep(1)


def freeze(scene: Scene) -> None:
    """The phase never ends, inside a function of C that no thread of Python can interrupt."""
    while True:
        ctypes.PyDLL(None).sleep(3600)  # holds the lock of the interpreter


def pause(scene: Scene) -> None:
    """The phase goes on when the file `GO` is there."""
    while not (scene.folder / GO).exists():
        time.sleep(0.05)


def engine_dies(scene: Scene) -> None:
    """The rollout engine raises an error of its own."""
    raise RuntimeError("EngineCore encountered an issue: the worker process died")


def vllm_dies(scene: Scene) -> None:
    """vLLM says that its engine is dead."""
    from vllm.v1.engine.exceptions import EngineDeadError

    raise EngineDeadError()


def out_of_memory(scene: Scene) -> None:
    """A tensor that no machine has room for."""
    import torch

    torch.empty(2**60, dtype=torch.uint8)


def no_number(scene: Scene) -> None:
    """The gradient of one weight is NaN in every update of the step."""
    _spoil(scene, float("nan"))


def infinite(scene: Scene) -> None:
    """The gradient of one weight is infinite in every update of the step."""
    _spoil(scene, float("inf"))


def _spoil(scene: Scene, value: float) -> None:
    def hook(gradient):
        return gradient * 0 + value if scene.now == scene.step else gradient

    parameters = scene.loop.engine.policy.parameters()
    next(p for p in parameters if p.requires_grad).register_hook(hook)


def clock_jumps(scene: Scene) -> None:
    """The clock goes a year ahead at once, and two years back with the next step."""
    seconds, nanoseconds = time.time, time.time_ns

    def ahead() -> float:
        return YEAR if scene.now == scene.step else -YEAR

    time.time = lambda: seconds() + ahead()
    time.time_ns = lambda: nanoseconds() + int(ahead() * 1e9)


def fill_disk(scene: Scene) -> None:
    """The disk of the run is full but for `REST` bytes.

    Where the run has no disk of its own, no file may have more than `SMALL_FILES` bytes.
    """
    if not os.path.ismount(scene.disk):
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILES, resource.RLIM_INFINITY))
        return
    with (scene.disk / "filler").open("wb", buffering=0) as filler:
        size = shutil.disk_usage(scene.disk).free - REST
        os.posix_fallocate(filler.fileno(), 0, size)


def fill_disk_wholly(scene: Scene) -> None:
    """Not a byte of the run's disk is free; where it has no disk of its own, no file may grow."""
    if not os.path.ismount(scene.disk):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        return
    with (scene.disk / "filler").open("wb", buffering=0) as filler:
        os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(scene.disk).free)


def make_room(scene: Scene) -> None:
    """Free what `fill_disk` took."""
    (scene.disk / "filler").unlink(missing_ok=True)
