"""How long a reader waits for the answer of a model that thinks while it reads.

The wait is simulated from counts. Words arrive at a steady pace, the question's first, then
sentence after sentence. Thought j starts when the last word of sentence j has arrived and the
thought before it is written. The deep segment starts when all is read and thought about. With
`read_first`, no thought starts before the last word. Every token takes the same time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def answer_latency(
    words: Sequence[int],
    tokens: Sequence[int],
    seconds_per_word: float,
    seconds_per_token: float,
    read_first: bool = False,
) -> float:
    """Seconds from the last input word to the first token of the answer.

    Args:
        words: [N], of each sentence. Those of the question would shift all times alike.
        tokens: [N + 1], of each thought, then of the deep segment up to the answer's first token
            (`to_answer`).
        seconds_per_word: between two words that arrive.
        seconds_per_token: to write a token.
        read_first: all is read before the first thought.
    """
    ready = seconds_per_word * np.cumsum(words)
    ready = np.append(ready, ready[-1])
    if read_first:
        ready[:] = ready[-1]
    written = seconds_per_token * np.cumsum(tokens)
    # end_j = max(ready_j, end_(j-1)) + time_j, unrolled. After the last segment that waited for
    # words, all is writing.
    waited = ready - np.append(0.0, written[:-1])
    return float(waited.max() + written[-1] - ready[-1])


def to_answer(deep: Sequence[int], eor: int) -> int:
    """Tokens of a deep segment up to the first one after <EOR>, which counts too.

    Args:
        deep: its token ids.
        eor: the id of <EOR>. Without it all tokens count.
    """
    ids = list(deep)
    if eor not in ids:
        return len(ids)
    return min(ids.index(eor) + 2, len(ids))
