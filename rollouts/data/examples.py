"""Examples as they come from data, prompts as a model reads them, and which prompts a step takes."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

Message = dict[str, str]
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One problem. The last message is the user's; what a dataset does not have is None."""

    index: int  # the row of the dataset, over all its files
    messages: list[Message]  # chat turns, each with `role` and `content`
    answer: str | None = None
    solution: str | None = None  # a supervised target
    # The parts of a text that is cut into sentences, for streaming: a thought per sentence (<skip>:
    # none), then `deep` reasoning, then `final`, which holds the answer.
    sentences: tuple[str, ...] | None = None
    thoughts: tuple[str, ...] | None = None
    question: str | None = None
    final: str | None = None
    deep: str | None = None
    context: str | None = None  # the text that is read unit by unit; None: the last message is
    # [F, D] float32: the source, where it is no text (rollouts/simultaneous/frames.py)
    frames: np.ndarray | None = None
    references: tuple[str, ...] | None = None  # all answers that are right, where there are several


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt; `index` is that of its example."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    example: Example
    # streaming: what is read step by step; joined they are `token_ids`
    segments: tuple[tuple[int, ...], ...] = ()
    # streaming: what the answer opens with, before the first thought
    opening: tuple[tuple[int, ...], ...] = ()


class PromptSampler:
    """Which prompts each step takes: each once per epoch, in that epoch's order; steps may straddle
    epochs.

    It has no state to save: a resumed run asks for step n and gets what an uninterrupted one got.
    """

    def __init__(self, count: int, per_step: int, seed: int):
        """`count` prompts, of which a step takes `per_step` (which may be more than `count`)."""
        if count < 1 or per_step < 1:
            raise ValueError(f"cannot sample {per_step} of {count} prompts")
        self.count, self.per_step, self.seed = count, per_step, seed
        self._cached: tuple[int, list[int]] = (-1, [])

    def indices(self, step: int) -> list[int]:
        """The prompts of a step, `per_step` numbers in 0 .. count - 1; steps count from 0."""
        if step < 0:
            raise ValueError(f"step {step} is below 0")
        places = range(step * self.per_step, (step + 1) * self.per_step)
        return [self._order(place // self.count)[place % self.count] for place in places]

    def _order(self, epoch: int) -> list[int]:
        if self._cached[0] != epoch:  # places go up, so one epoch at a time is enough
            order = list(range(self.count))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._cached = epoch, order
        return self._cached[1]
