"""Rewards of a completion that was written while reading: its format, and how little it thought,
stage by stage.

Our form of AdaSR's rewards (arXiv 2606.14694), whose code and coefficients are not public
(methods.md, 4). S streaming tokens in N slots, D deep tokens with the answer; acc is the verifier's
score. All are in [0, 1]:

    fmt_s    share of slots that the model closed itself, with one <EOT>, or that are a lone <skip>
    fmt_d    1 if the deep segment ended by itself, with one <EOR> and one boxed answer after it
    think_s  acc (1 - S / (N max_thought_tokens)) think_d  acc (1 - D / max_new_tokens): only of
    correct answers, so that a short wrong one gains nothing
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Callable, Collection

import numpy as np

from rewards.math import BOX, extract_boxed


@dataclass(frozen=True)
class Stages:
    """What one completion is worth; the arrays are [N]."""

    accuracy: float
    closed: np.ndarray  # bool: which slots have the right form
    lengths: np.ndarray  # tokens of each slot, closing token included
    skipped: np.ndarray  # bool: which are a lone <skip>
    deep_format: float
    deep_length: int
    max_thought_tokens: int
    max_new_tokens: int  # of the deep segment

    @property
    def streaming_format(self) -> float:
        return float(self.closed.mean())

    @property
    def format(self) -> float:
        return self.streaming_format * self.deep_format

    @property
    def thoughts(self) -> np.ndarray:
        """[N] think_s of each slot alone; their mean is think_s."""
        return self.accuracy * (1 - self.lengths / self.max_thought_tokens)

    @property
    def deep_thought(self) -> float:
        return self.accuracy * (1 - self.deep_length / self.max_new_tokens)

    def rewards(self, options) -> tuple[float, float, float]:
        """(global, streaming, deep), with the weights of the config's section `hrpo`."""
        weight = options.format_weight
        return (
            self.accuracy + weight * self.format,
            float(self.sentence_rewards(options).mean()),
            weight * self.deep_format + self.accuracy + options.deep_weight * self.deep_thought,
        )

    def sentence_rewards(self, options) -> np.ndarray:
        """[N]; their mean is the streaming reward."""
        return (
            options.format_weight * self.closed
            + options.streaming_weight * self.thoughts
            + options.deep_credit * options.deep_weight * self.deep_thought
        )


def score_stages(
    trajectory,
    protocol,
    decode: Callable[[list[int]], str],
    stop_ids: Collection[int],
    max_thought_tokens: int,
    max_new_tokens: int,
) -> Stages:
    """Measure a streaming trajectory.

    Args:
        trajectory: a `Trajectory` with `score` and `slots`.
        protocol: the `Protocol` of its vocabulary.
        decode: the text of token ids.
        stop_ids: end tokens, which have no place in a thought.
        max_thought_tokens, max_new_tokens: the limits that it was drawn with.
    """
    slots = trajectory.slots
    ids, sampled = np.asarray(trajectory.completion_ids), trajectory.sampled_mask
    marks, last = {*protocol.ids, *stop_ids}, int(slots[-1])
    closed, lengths, skipped = [], [], []
    for slot in range(last):
        places = np.flatnonzero(slots == slot)
        *inside, end = ids[places].tolist()
        skipped.append(end == protocol.skip and not inside)
        closed.append(
            bool(sampled[places[-1]])
            and (skipped[-1] or end == protocol.eot)
            and not marks & {*inside}
        )
        lengths.append(len(places))
    deep = ids[slots == last].tolist()
    return Stages(
        trajectory.score,
        np.array(closed),
        np.array(lengths),
        np.array(skipped),
        deep_format(deep, trajectory.finish_reason, protocol.eor, marks, decode),
        len(deep),
        max_thought_tokens,
        max_new_tokens,
    )


def deep_format(
    ids: list[int],
    finish_reason: str,
    eor: int,
    marks: Collection[int],
    decode: Callable[[list[int]], str],
) -> float:
    """1.0 if the deep segment is `reasoning <EOR> answer <EOA>` (or another end), the answer having
    the only box."""
    body = ids[:-1]
    if finish_reason != "stop" or [token for token in body if token in marks] != [eor]:
        return 0.0
    place = body.index(eor)
    before, after = decode(body[:place]), decode(body[place + 1 :])
    return float(
        not re.search(BOX, before)
        and len(re.findall(BOX, after)) == 1
        and bool(extract_boxed(after))
    )
