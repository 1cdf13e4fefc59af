"""Examples, the prompts made of them, and the order in which a run takes the prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

Message = dict[str, str]
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One problem of a data set. A field is None where the data set has nothing for it.

    The fields from `sentences` to `deep` belong to a text that is cut into sentences. Its target is
    a thought per sentence, then `deep`, then `final`.
    """

    # The row of the data set, counted from 0 over all its files.
    index: int
    # Chat turns, each with `role` and `content`. The last one is the user's.
    messages: list[Message]
    # What a verifier compares a completion with.
    answer: str | None = None
    # The target of supervised training.
    solution: str | None = None
    # The source, in the order in which it is read.
    sentences: tuple[str, ...] | None = None
    # One per sentence; <skip> where there is nothing to think.
    thoughts: tuple[str, ...] | None = None
    # What is asked of the sentences, or of `context`.
    question: str | None = None
    # The end of the target, which holds the answer.
    final: str | None = None
    # The reasoning after the last thought.
    deep: str | None = None
    # The text that is read unit by unit. None: the last message is.
    context: str | None = None
    # [F, D] float32: a source that is no text.
    frames: np.ndarray | None = None
    # Chat turns that a teacher reads in place of `messages`.
    teacher_messages: list[Message] | None = None
    # The teacher that scores it, of several.
    teacher: str | None = None
    # All right answers, where the data set has several.
    references: tuple[str, ...] | None = None

    @property
    def right_answers(self) -> tuple[str, ...]:
        """The answers of which a completion needs one; none where the data set has none."""
        if self.references:
            return self.references
        return () if self.answer is None else (self.answer,)


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt."""

    # That of the example.
    index: int
    token_ids: Ids
    # What the ids spell.
    text: str
    example: Example
    # What a streaming model reads step by step. Joined, the segments are `token_ids`.
    segments: tuple[Ids, ...] = ()
    # What the completion of a streaming model begins with, before anything is sampled.
    opening: tuple[Ids, ...] = ()


class PromptSampler:
    """Which prompts each step takes: each prompt once per epoch, in that epoch's order.

    A step may straddle two epochs. There is no state to save: a resumed run asks for step n, and
    gets what an uninterrupted run got.

    Args:
        count: the number of prompts, 1 or more.
        per_step: how many of them a step takes; it may exceed `count`.
        seed: of the orders.

    Raises:
        ValueError: `count` or `per_step` is below 1.
    """

    def __init__(self, count: int, per_step: int, seed: int):
        if count < 1 or per_step < 1:
            raise ValueError(f"cannot sample {per_step} of {count} prompts")
        self.count = count
        self.per_step = per_step
        self.seed = seed
        # Steps go up, so one epoch's order at a time is enough.
        self._epoch = -1
        self._order: list[int] = []

    def indices(self, step: int) -> list[int]:
        """The prompts of a step, counted from 0: `per_step` numbers in 0 .. count - 1.

        Raises:
            ValueError: the step is below 0.
        """
        if step < 0:
            raise ValueError(f"step {step} is below 0")
        places = range(step * self.per_step, (step + 1) * self.per_step)
        return [self._epoch_order(place // self.count)[place % self.count] for place in places]

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._epoch != epoch:
            order = list(range(self.count))
            # A string seeds by its SHA-512, so the order is the same in every process.
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._epoch, self._order = epoch, order
        return self._order
