"""Interleaved rollouts, [s_1 t_1 s_2 t_2 …]: continuation over an engine that knows nothing of
streaming.

Each round appends the next source segment to every row and lets the engine write the next thought;
a last round writes the deep segments. Positions are natural and attention is causal, so any token
engine serves. vLLM's prefix cache holds what a row has so far: it is kept from round to round, and
reset at the first and by every weight sync."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import zip_longest
from typing import Callable, Sequence

import numpy as np

from rollouts.layout import arrange
from rollouts.trajectory import Request, Sampling, Trajectory


class InterleavedEngine:
    """Wraps an engine; all but `generate` is the engine's own."""

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Trajectory]:
        """One trajectory per request, in their order. The prompt is all before the first sampled
        token; the completion has the later source segments in it, marked as not sampled."""
        written: list[list[list[int]]] = [[] for _ in requests]
        logprobs: list[list[list[float]]] = [[] for _ in requests]
        forced: list[list[bool]] = [[] for _ in requests]
        # A closing token at the limit is forced, so one less is sampled.
        thought = replace(
            sampling,
            max_new_tokens=sampling.max_thought_tokens - 1,
            stop_ids=sampling.thought_stops,
        )
        most = max((r.thoughts for r in requests), default=0)
        for slot in range(most + 1):
            deep = slot == most
            rows = [i for i, r in enumerate(requests) if deep or slot < r.thoughts]
            asked = [
                replace(
                    requests[i],
                    prompt_ids=context(requests[i], written[i]),
                    seed=slot_seed(requests[i].seed, len(written[i])),
                )
                for i in rows
            ]
            drawn = self.engine.generate(
                asked,
                sampling if deep else thought,
                continues=slot > 0,
                on_finished=on_finished if deep else None,
            )
            for i, trajectory in zip(rows, drawn):
                cut = not deep and trajectory.finish_reason == "length"
                written[i].append(trajectory.completion_ids + [sampling.close_id] * cut)
                logprobs[i].append([*trajectory.logprobs, *[0.0] * cut])
                forced[i].append(cut)
        made = []
        for request, trajectory, *parts in zip(requests, drawn, written, logprobs, forced):
            fields = arrange("interleaved", request.segments, request.opening, parts[0], parts[2])
            own = np.zeros(len(fields["completion_ids"]), dtype=np.float32)
            own[fields["slots"] >= 0] = np.concatenate(parts[1])
            made.append(
                Trajectory(
                    request.prompt_index,
                    request.sample_index,
                    logprobs=own,
                    finish_reason=trajectory.finish_reason,
                    **fields,
                )
            )
        return made


def context(request: Request, written: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What the next slot goes on from: every segment up to its own, and the target segments in
    between."""
    targets = [*request.opening, *written]
    segments = request.segments[: len(targets) + 1]
    return tuple(
        i for pair in zip_longest(segments, targets, fillvalue=()) for part in pair for i in part
    )


def slot_seed(seed: int, slot: int) -> int:
    """A seed of its own for each slot of a completion, 63 bits."""
    return (
        int.from_bytes(hashlib.blake2b(f"{seed}/{slot}".encode(), digest_size=8).digest(), "little")
        >> 1
    )
