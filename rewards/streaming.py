"""Rewards of a completion that was written while reading: for its form, and for short thoughts.

This is our form of AdaSR's rewards (arXiv 2606.14694). We found no code for it, and no coefficients
(docs/specification.md, 4). A completion has S streaming tokens in N slots, one slot per sentence,
and D deep tokens, the answer included; acc is the verifier's score. All four are in [0, 1]:

    fmt_s    share of slots that the model closed itself, with one <EOT>, or that are a lone <skip>
    fmt_d    1 if the deep segment ended by itself, with one <EOR> and one boxed answer after it
    think_s  acc (1 - S / (N max_thought_tokens))
    think_d  acc (1 - D / max_new_tokens)

Only correct answers earn think_s and think_d, so that a short wrong one gains nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewards.math import BOX, extract_boxed


@dataclass(frozen=True)
class Stages:
    """What one completion is worth, stage by stage.

    Attributes:
        accuracy: the verifier's score, in [0, 1].
        closed: [N] bool, the slots that have the right form.
        lengths: [N] int, tokens of each slot, closing token included.
        skipped: [N] bool, the slots that are a lone <skip>.
        deep_format: fmt_d, 0 or 1.
        deep_length: D, in tokens.
        max_thought_tokens: the limit on the tokens of a slot.
        max_new_tokens: the limit on the tokens of the deep segment.
        answer_reward: what stands for the accuracy where it is added; None: itself.
    """

    accuracy: float
    closed: np.ndarray
    lengths: np.ndarray
    skipped: np.ndarray
    deep_format: float
    deep_length: int
    max_thought_tokens: int
    max_new_tokens: int
    answer_reward: float | None = None

    @property
    def answer(self) -> float:
        """What the answer is worth in sums: the accuracy, or the reward in its place."""
        return self.accuracy if self.answer_reward is None else self.answer_reward

    @property
    def streaming_format(self) -> float:
        """fmt_s."""
        return float(self.closed.mean())

    @property
    def format(self) -> float:
        """fmt_s fmt_d."""
        return self.streaming_format * self.deep_format

    @property
    def thoughts(self) -> np.ndarray:
        """[N], think_s of each slot alone; their mean is think_s."""
        shares = self.lengths / self.max_thought_tokens
        return self.accuracy * (1 - shares)

    @property
    def deep_thought(self) -> float:
        """think_d."""
        share = self.deep_length / self.max_new_tokens
        return self.accuracy * (1 - share)

    def rewards(self, options: Any) -> tuple[float, float, float]:
        """The rewards of the whole completion, of its streaming part and of its deep segment.

        Args:
            options: the weights, the config's section `hrpo`.

        Returns:
            (global, streaming, deep).
        """
        weight = options.format_weight
        whole = self.answer + weight * self.format
        streaming = float(self.sentence_rewards(options).mean())
        deep = weight * self.deep_format + self.answer + options.deep_weight * self.deep_thought
        return whole, streaming, deep

    def sentence_rewards(self, options: Any) -> np.ndarray:
        """[N], the reward of each slot; their mean is the streaming reward.

        Args:
            options: as in `rewards`.
        """
        return (
            options.format_weight * self.closed
            + options.streaming_weight * self.thoughts
            + options.deep_credit * options.deep_weight * self.deep_thought
        )


def score_stages(
    trajectory: Any,
    protocol: Any,
    decode: Callable[[list[int]], str],
    stop_ids: Collection[int],
    max_thought_tokens: int,
    max_new_tokens: int,
) -> Stages:
    """Measure a streaming trajectory.

    Args:
        trajectory: a `Trajectory` with `score`, and with `slots` [T], whose last is N.
        protocol: the `Protocol` of its vocabulary.
        decode: gives the text of token ids.
        stop_ids: end tokens, which have no place in a thought.
        max_thought_tokens: the limit on a slot that the trajectory was drawn with.
        max_new_tokens: its limit on the deep segment.
    """
    slots, sampled = trajectory.slots, trajectory.sampled_mask
    ids = np.asarray(trajectory.completion_ids)
    marks = {*protocol.ids, *stop_ids}
    count = int(slots[-1])
    closed, lengths, skipped = [], [], []
    for slot in range(count):
        places = np.flatnonzero(slots == slot)
        *thought, end = ids[places].tolist()
        skips = end == protocol.skip and not thought
        # A closing token that was forced at the limit is not the model's own.
        chosen = bool(sampled[places[-1]])
        closed.append(chosen and (skips or end == protocol.eot) and marks.isdisjoint(thought))
        lengths.append(len(places))
        skipped.append(skips)
    deep_ids = ids[slots == count].tolist()
    return Stages(
        accuracy=trajectory.score,
        closed=np.array(closed),
        lengths=np.array(lengths),
        skipped=np.array(skipped),
        deep_format=deep_format(deep_ids, trajectory.finish_reason, protocol.eor, marks, decode),
        deep_length=len(deep_ids),
        max_thought_tokens=max_thought_tokens,
        max_new_tokens=max_new_tokens,
    )


def deep_format(
    ids: list[int],
    finish_reason: str,
    eor: int,
    marks: Collection[int],
    decode: Callable[[list[int]], str],
) -> float:
    """1.0 if a deep segment is `reasoning <EOR> answer <EOA>`, else 0.0.

    The answer must have the only box. Another end token may stand for <EOA>.

    Args:
        ids: the segment's token ids.
        finish_reason: "stop" if the model ended it.
        eor: the id of <EOR>.
        marks: protocol and end tokens; only <EOR> may stand before the end.
        decode: gives the text of token ids.
    """
    body = ids[:-1]
    if finish_reason != "stop" or [token for token in body if token in marks] != [eor]:
        return 0.0
    place = body.index(eor)
    reasoning, answer = decode(body[:place]), decode(body[place + 1 :])
    one_box = not re.search(BOX, reasoning) and len(re.findall(BOX, answer)) == 1
    return float(one_box and bool(extract_boxed(answer)))
