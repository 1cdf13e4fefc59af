"""The end of a run that fails: what happened where, what to lower, and how to go on."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from recipes.errors import OnstreamError, TrainingError, first_line, one_line
from trainers.core import checkpoint, watchdog
from trainers.core.watchdog import Phase, Watchdog

# What torch, CUDA, the C++ library and the system say where memory is missing.
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|out of memory|cannot allocate memory|bad_alloc|no available memory",
    re.IGNORECASE,
)
# What a process group says where another rank is gone.
RANK_GONE = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket|store|remote process|timed out",
    re.IGNORECASE,
)
# Classes of errors on a child process that is gone, by name, so that no package loads for them.
CHILD_GONE = ("EngineDeadError", "BrokenProcessPool")
# Seconds that closing something may take after an error, and to learn why another rank has ended.
CLOSING, LEARNING = 30.0, 8.0

SAMPLING = (
    "lower rollout.batch_size or rollout.max_new_tokens; with vLLM, rollout.cpu_kv_cache_gib or "
    "rollout.gpu_memory_utilization"
)
SCORING = (
    "lower train.tokens_per_microbatch, or set model.gradient_checkpointing=true, "
    "model.dtype=bfloat16 or engine=zero2_offload"
)
# What to do where a phase has too little memory.
REMEDIES = {
    "load": "take model.dtype=bfloat16, engine=zero2_offload or a smaller model",
    "rollout": SAMPLING,
    "evaluate": SAMPLING,
    "annotate": SCORING,
    "update": SCORING,
}
OTHERWISE = "end other jobs on this machine, or take a smaller model"


@contextlib.contextmanager
def watched(deadline, say_error: Callable[[Exception], None]) -> Iterator[Watchdog]:
    """Watch this process, and turn whatever ends the work into one line.

    After an error the watchdog's `cleanup` is called, each part for `CLOSING` seconds at most.

    Args:
        deadline: the config's section.
        say_error: prints an error's one line.

    Raises:
        OnstreamError: the line. Other ranks know it then.
    """
    with watchdog.watching(deadline, say_error) as dog:
        try:
            yield dog
        except (Exception, KeyboardInterrupt) as error:
            line = ending(error, dog)
            dog.tell(str(line))
            for what, function in dog.cleanup:
                within(CLOSING, what, function)
            raise line from (None if line is error else error)


def ending(error: BaseException, dog: Watchdog) -> OnstreamError:
    """The one line that a run ends with. An error that nobody expected gets its traceback first.

    Args:
        error: any that came out of the run.
        dog: knows the phase that it came out of, and the run's directory.
    """
    if isinstance(error, OnstreamError):
        return error
    failed = dog.failed
    place = failed.place if failed else "between phases"
    after = continuation(dog.directory)
    if isinstance(error, KeyboardInterrupt):
        return TrainingError(f"interrupted in {place}; {after}")
    known = explained(error, failed)
    if known is None and (reason := _reason_of_another(error, dog)):
        known = reason
    if known is None:
        traceback.print_exception(error)
        known = f"{type(error).__name__}: {one_line(error)}"
    return TrainingError(f"{place}: {known}; {after}")


def explained(error: BaseException, phase: Phase | None) -> str | None:
    """What is wrong and what to do, for want of memory and dead child processes; None: another
    error."""
    for cause in _causes(error):
        if is_out_of_memory(cause):
            remedy = REMEDIES.get(phase.name if phase else "", OTHERWISE)
            return f"out of memory ({first_line(cause)[:160].rstrip('.')}); {remedy}"
        if type(cause).__name__ in CHILD_GONE:
            return (
                f"a child process died ({type(cause).__name__}: {first_line(cause)[:160]}); where "
                "the system killed it for want of memory, its log says so (dmesg)"
            )
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or a library says that memory is missing."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch has no class of its own for the host's memory.
    return isinstance(error, (RuntimeError, OSError)) and bool(OUT_OF_MEMORY.search(str(error)))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _reason_of_another(error: BaseException, dog: Watchdog) -> str:
    """Why another rank has ended, where a collective failed for that; else empty."""
    if dog.peers is None or not isinstance(error, RuntimeError):
        return ""
    if RANK_GONE.search(str(error)):
        dog.peers.failed.wait(LEARNING)
    return dog.peers.failure


def continuation(directory: Path | None) -> str:
    """How to go on: from the last checkpoint, where there is one."""
    points = checkpoint.complete(directory) if directory else []
    if not points:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {points[-1]}; continue with run.dir={directory} resume=auto"


def within(seconds: float, what: str, function: Callable[[], object]) -> None:
    """Call something after an error, for so long.

    Its own error is a remark, so that the first one stays the one that counts.
    """

    def call() -> None:
        try:
            function()
        except Exception as error:
            print(f"{what} failed: {one_line(error)}", file=sys.stderr)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        print(f"{what} takes more than {seconds:.0f} s and is left", file=sys.stderr)


def closing(loop) -> list[tuple[str, Callable[[], object]]]:
    """What is closed where a loop fails, in order."""

    def close_records() -> None:
        if loop.tracker is not None:
            loop.tracker.finish()

    def close_engine() -> None:
        if loop.run.rollout is not None:
            loop.run.rollout.close()

    return [("closing the records", close_records), ("closing the rollout engine", close_engine)]
