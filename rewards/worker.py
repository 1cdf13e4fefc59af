"""Calls of foreign Python code that are given up when they take too long."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

# Calls that were given up and still run; with so many, none is begun.
MOST_LOST = 4


class Answer(NamedTuple):
    """What a call gave: a value, or the error that it ended with."""

    value: Any = None
    error: BaseException | None = None


class Worker:
    """A thread that calls functions, one after another. Where it is given up, another follows.

    Python cannot end a thread. What was given up runs on, beside the run, and ends with it.
    """

    def __init__(self, name: str):
        self.name = name
        self.tasks: queue.SimpleQueue[Any] | None = None
        self.lost: list[threading.Event] = []

    def call(self, function: Callable[[], Any], seconds: float) -> Answer:
        """The answer of `function()`; a TimeoutError where that takes longer than `seconds`."""
        self.lost = [ended for ended in self.lost if not ended.is_set()]
        if len(self.lost) >= MOST_LOST:
            return Answer(error=TimeoutError(f"{MOST_LOST} earlier calls have not ended yet"))
        if self.tasks is None:
            self.tasks = queue.SimpleQueue()
            # A daemon: the process ends without it.
            threading.Thread(target=_serve, args=(self.tasks,), name=self.name, daemon=True).start()
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        ended = threading.Event()
        self.tasks.put((function, answers, ended))
        try:
            return answers.get(timeout=seconds)
        except queue.Empty:
            self.tasks.put(None)
            self.tasks = None
            self.lost.append(ended)
            return Answer(error=TimeoutError(f"not answered within {seconds:.3g} s"))


def _serve(tasks: queue.SimpleQueue[Any]) -> None:
    while (task := tasks.get()) is not None:
        function, answers, ended = task
        try:
            answer = Answer(function())
        except BaseException as error:  # whatever it is, the run hears of it
            answer = Answer(error=error)
        ended.set()
        answers.put(answer)
