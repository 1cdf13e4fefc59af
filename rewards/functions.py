"""Rewards of whole completions beside the verifier's: functions and services, each with a weight.

A function that raises, gives no finite number, or takes too long has failed. Where the config
states a default, that is then the completion's score, the failure is counted, and the run goes on.
Without one the run ends.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from recipes.components import VERIFIERS
from recipes.errors import TrainingError, one_line
from rewards.calls import Asked, Call, Question, made
from rewards.service import Service
from rewards.worker import Answer, Worker

# Seconds that a function may take beyond a limit to which it keeps by itself.
GRACE = 1.0
# Whole steps in a row in which a function gave no score, after which the run ends.
MOST_STEPS = 3


@dataclass(frozen=True)
class Failure:
    """Why there is no score."""

    reason: str
    error: BaseException | None = None


@dataclass(frozen=True)
class Scores:
    """What the functions say of a completion, by their names."""

    values: dict[str, float]
    # Why a value is the stated default.
    failures: dict[str, str]


class RewardFunction:
    """A function of the config's section `reward.functions`.

    Args:
        name: the user's.
        options: its section.
        rewards: the section `reward`.

    Raises:
        ConfigError: it cannot be imported, or takes other arguments.
    """

    def __init__(self, name: str, options: Any, rewards: Any):
        self.name, self.options = name, options
        self.key = f"reward.functions.{name}"
        self.where = f"{self.key} ({options.path or options.url})"
        self.batch_seconds = rewards.seconds_per_batch
        function: Any
        if options.url is not None:
            function, kwargs = Service(options.url, options.batch, options.kwargs), {}
        else:
            function = made(VERIFIERS.resolve(options.path), rewards)
            kwargs = dict(options.kwargs)
        self.call = Call(function, self.where, **kwargs)
        self.worker = Worker(self.key)

    def scores(self, questions: Sequence[Question]) -> list[float | Failure]:
        """The score of each completion: the best over its answers. It fails where one does."""
        asked = self.call.asked(questions)
        flat = [pair for pairs in asked for pair in pairs]
        given = iter(self._batch(flat) if self.call.takes_batch else self._each(flat))
        return [_best([next(given) for _ in pairs]) for pairs in asked]

    def _each(self, asked: Sequence[Asked]) -> list[float | Failure]:
        deadline = time.monotonic() + self.batch_seconds
        found: list[float | Failure] = []
        for pair in asked:
            limit = min(self.options.seconds, deadline - time.monotonic())
            if limit <= 0:
                found.append(Failure(f"reward.seconds_per_batch={self.batch_seconds:g} were over"))
                continue
            answer = self._ask(partial(self.call.one, pair, limit), limit)
            found.append(_score(answer.value) if answer.error is None else _failed(answer.error))
        return found

    def _batch(self, asked: Sequence[Asked]) -> list[float | Failure]:
        limit = min(self.options.seconds, self.batch_seconds)

        def listed() -> list[Any]:
            scores = self.call.batch(asked, limit)
            scores = scores.tolist() if hasattr(scores, "tolist") else list(scores)
            if len(scores) != len(asked):
                raise ValueError(f"{len(scores)} scores for {len(asked)} completions")
            return scores

        answer = self._ask(listed, limit)
        if answer.error is not None:
            return [_failed(answer.error)] * len(asked)
        return [_score(value) for value in answer.value]

    def _ask(self, function: Callable[[], Any], limit: float) -> Answer:
        return self.worker.call(function, limit + GRACE * self.call.takes_seconds)


class Functions:
    """The functions of a run.

    Args:
        options: the config's section `reward`.

    Raises:
        ConfigError: one of them cannot be used.
    """

    def __init__(self, options: Any):
        self.functions = [
            RewardFunction(name, function, options) for name, function in options.functions.items()
        ]
        # The functions whose first failure was said, and steps in a row without one score.
        self.said: set[str] = set()
        self.silent: dict[str, int] = {}

    def score(self, questions: Sequence[Question]) -> list[Scores]:
        """What all functions say of each completion.

        Raises:
            TrainingError: one fails, and no default is stated.
        """
        found = [Scores({}, {}) for _ in questions]
        for function in self.functions:
            for question, scores, score in zip(questions, found, function.scores(questions)):
                if isinstance(score, float):
                    scores.values[function.name] = score
                    continue
                if function.options.default is None:
                    raise TrainingError(
                        f"{function.where} failed on row {question.row.get('index')}: "
                        f"{score.reason}; mend it, or give the score that then counts with "
                        f"{function.key}.default"
                    ) from score.error
                scores.values[function.name] = function.options.default
                scores.failures[function.name] = score.reason
        return found

    def account(
        self,
        step: int,
        failures: Sequence[tuple[int, dict[str, str]]],
        say: Callable[[str], None],
    ) -> None:
        """Say what failed first, and what failed throughout.

        Args:
            step: from 1.
            failures: of every completion of a step, its row and why functions failed on it.
            say: prints a line.

        Raises:
            TrainingError: for `MOST_STEPS` steps in a row a function gave no score.
        """
        for function in self.functions:
            name = function.name
            failed = [(row, reasons[name]) for row, reasons in failures if name in reasons]
            throughout = bool(failed) and len(failed) == len(failures)
            self.silent[name] = self.silent.get(name, 0) + 1 if throughout else 0
            if not throughout and (not failed or name in self.said):
                continue
            self.said.add(name)
            row, reason = failed[0]
            line = (
                f"step {step}: {function.where} failed for {len(failed)} of {len(failures)} "
                f"completions, first on row {row}: {reason}"
            )
            if self.silent[name] == MOST_STEPS:
                raise TrainingError(
                    f"{line}; it gave no score for {MOST_STEPS} steps, so the run ends"
                )
            say(f"{line}; {function.options.default:g} counts")


def _score(value: Any) -> float | Failure:
    """A function's value as a score."""
    if isinstance(value, BaseException):
        return _failed(value)
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        return Failure(f"{value!r:.60} is no number".replace("\n", " "))
    try:
        score = float(value)
    except Exception as error:
        return _failed(error)
    return score if math.isfinite(score) else Failure(f"{score} is not finite")


def _failed(error: BaseException) -> Failure:
    """Why a call failed: the error, and the line of code that raised it."""
    reason = type(error).__name__
    if str(error).strip():
        reason += f": {one_line(error, 160)}"  # type: ignore[arg-type]
    frames = traceback.extract_tb(error.__traceback__)
    foreign = [frame for frame in frames if Path(frame.filename).parent != Path(__file__).parent]
    if foreign:
        reason += f" ({Path(foreign[-1].filename).name}:{foreign[-1].lineno})"
    return Failure(reason, error)


def _best(scores: Sequence[float | Failure]) -> float | Failure:
    failures = [score for score in scores if isinstance(score, Failure)]
    return failures[0] if failures else max(score for score in scores if isinstance(score, float))
