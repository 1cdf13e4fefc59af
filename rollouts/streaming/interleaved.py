"""Interleaved rollouts, [s_1 t_1 s_2 t_2 …]: continuation over an engine without streaming.

Each round appends the next source segment to every row and lets the engine write the next thought.
A last round writes the deep segments. Positions are natural and attention is causal, so any token
engine serves. vLLM's prefix cache holds what a row has so far. The cache is kept from round to
round, and reset at the first round and by every weight sync.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import numpy as np
from torch import Tensor

from rollouts.engines.base import Engine
from rollouts.layout import arrange
from rollouts.streaming.tokens import StreamingSampling
from rollouts.trajectory import Request, Trajectory


class InterleavedEngine:
    """Wraps an engine; everything but `generate` is the engine's own."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def generate(
        self,
        requests: Sequence[Request],
        sampling: StreamingSampling,
        continues: bool = False,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Trajectory]:
        """Draw one trajectory per request, in their order (rollouts/engines/base.py).

        The prompt is everything before the first sampled token. The completion has the later source
        segments in it, marked as not sampled.
        """
        targets = [Target(request) for request in requests]
        # A closing token is forced at the limit of a thought, so one token less is sampled.
        thought = replace(
            sampling,
            max_new_tokens=sampling.max_thought_tokens - 1,
            stop_ids=sampling.thought_stops,
        )
        rounds = max((request.thoughts for request in requests), default=0)
        for slot in range(rounds):
            thinking = [target for target in targets if slot < target.request.thoughts]
            prompts = [target.next_request() for target in thinking]
            thoughts = self.engine.generate(prompts, thought, continues=continues or slot > 0)
            for target, trajectory in zip(thinking, thoughts):
                target.append_thought(trajectory, sampling.close_id)
        prompts = [target.next_request() for target in targets]
        answers = self.engine.generate(
            prompts, sampling, continues=continues or rounds > 0, on_finished=on_finished
        )
        return [target.finish(trajectory) for target, trajectory in zip(targets, answers)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.engine.load_weights(weights)

    def fingerprints(self, names: Sequence[str], salt: int) -> dict[str, int | None]:
        return self.engine.fingerprints(names, salt)

    def sleep(self) -> None:
        self.engine.sleep()

    def wake(self) -> None:
        self.engine.wake()

    def close(self) -> None:
        self.engine.close()


@dataclass
class Target:
    """What one request has so far: the target segments after its opening."""

    request: Request
    segments: list[list[int]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # Per segment: its last token was put there at the limit.
    forced: list[bool] = field(default_factory=list)

    def next_request(self) -> Request:
        """The request of the next segment, with a seed of its own."""
        return replace(
            self.request,
            prompt_ids=context(self.request, self.segments),
            seed=slot_seed(self.request.seed, len(self.segments)),
        )

    def append_thought(self, trajectory: Trajectory, close_id: int | None) -> None:
        """Append a thought, closed by force where it reached the limit."""
        forced = trajectory.finish_reason == "length"
        closing = [close_id] if forced else []
        self.segments.append([*trajectory.completion_ids, *closing])
        self.logprobs += [*trajectory.logprobs, *(0.0 for _ in closing)]
        self.forced.append(forced)

    def finish(self, trajectory: Trajectory) -> Trajectory:
        """The whole trajectory, whose last segment is that of the given one."""
        fields = arrange(
            "interleaved",
            self.request.segments,
            self.request.opening,
            [*self.segments, trajectory.completion_ids],
            [*self.forced, False],
        )
        logprobs = np.zeros(len(fields["completion_ids"]), dtype=np.float32)
        logprobs[fields["slots"] >= 0] = [*self.logprobs, *trajectory.logprobs]
        return Trajectory(
            self.request.prompt_index,
            self.request.sample_index,
            logprobs=logprobs,
            finish_reason=trajectory.finish_reason,
            **fields,
        )


def context(request: Request, written: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """What the next target segment continues: every segment up to its own, in order of arrival."""
    targets = [*request.opening, *written]
    segments = request.segments[: len(targets) + 1]
    pairs = zip_longest(segments, targets, fillvalue=())
    return tuple(token for pair in pairs for part in pair for token in part)


def slot_seed(seed: int, slot: int) -> int:
    """A seed of its own for each slot of a completion, 63 bits."""
    digest = hashlib.blake2b(f"{seed}/{slot}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
