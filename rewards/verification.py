"""Scores a batch of completions in bounded time, whatever is in them.

A verifier is a function of (completion, answer) that returns a score (rewards/calls.py). One that
has a parameter `seconds` takes part in the bound: it raises TimeoutError where it needs longer.
All completions are tried with a short limit first. Those that need longer share the batch's
seconds, in rounds of ever longer limits. So a slow completion takes no time from an ordinary one,
in whatever order they come.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from recipes.errors import TrainingError
from rewards.calls import Asked, Call, Question

Verifier = Callable[..., float]

# Seconds for each completion in the first round, which the batch's seconds do not count.
QUICK = 0.05
# How much longer the limit of the next round is.
GROWTH = 4
# Seconds for a completion in the last round.
LONGEST = 5.0


class Verdict(NamedTuple):
    """What a verifier says of a completion.

    Attributes:
        score: the best over the right answers.
        timed_out: a comparison did not end in time and counts as 0, so the score may be too low.
    """

    score: float
    timed_out: bool


def verdicts(
    verifier: Verifier, questions: Sequence[tuple[str, Sequence[str]]], seconds: float
) -> list[Verdict]:
    """The verdict on each completion.

    Args:
        verifier: gives the score of (completion, answer), or the scores of a batch
            (rewards/calls.py).
        questions: each a `Question`, or a completion with its right answers, of which any counts.
        seconds: what the completions that need longer than `QUICK` may take together.

    Raises:
        TrainingError: a verifier of a batch gives another number of scores.
    """
    call = Call(verifier, "reward.verifier")
    asked = call.asked([Question(*question) for question in questions])
    flat = [pair for pairs in asked for pair in pairs]
    if call.takes_batch:
        scores = list(call.batch(flat, seconds)) if flat else []
        if len(scores) != len(flat):
            raise TrainingError(
                f"reward.verifier gave {len(scores)} scores for {len(flat)} completions; it must "
                "give one for each"
            )
    elif call.takes_seconds:
        scores = _bounded(call, flat, seconds)
    else:
        scores = [call.one(pair) for pair in flat]
    given = iter(scores)
    found = []
    for pairs in asked:
        own = [next(given) for _ in pairs]
        best = max(score or 0.0 for score in own)
        found.append(Verdict(best, None in own and best < 1))
    return found


def _bounded(call: Call, pairs: Sequence[Asked], seconds: float) -> list[float | None]:
    """The score of each pair; None for one that did not end in time."""
    scores: list[float | None] = [None] * len(pairs)

    def try_each(pending: Sequence[int], limit: float, deadline: float) -> list[int]:
        """One round; returns those that are still open."""
        for index in pending:
            left = deadline - time.monotonic()
            if left > 0:
                with contextlib.suppress(TimeoutError):
                    scores[index] = call.one(pairs[index], min(limit, left))
        return [index for index in pending if scores[index] is None]

    pending = try_each(range(len(pairs)), QUICK, math.inf)
    deadline, limit = time.monotonic() + seconds, QUICK
    while pending and limit < LONGEST and time.monotonic() < deadline:
        limit = min(GROWTH * limit, LONGEST)
        pending = try_each(pending, limit, deadline)
    return scores
