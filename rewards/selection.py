"""Which tokens of a response learn: those of highest score.

A score is a class with a line in `recipes.components.TOKEN_SCORES`, under the name by which
`reward.select.score` selects it. It is constructed with the config's section `reward.select`. A
call maps the teacher's and the student's log-probs [T] (nats) of a response's tokens to scores [T].
Only their order counts.
"""

from __future__ import annotations

import numpy as np


class Dial:
    """The score of DIAL-OPD (arXiv 2610.11659): |log p - log q|^(1 - beta) * |p - q|^beta.

    That is the logarithmic mean of both probabilities to the power beta, times the log-ratio's
    size. beta = 0 selects by the log-ratio, beta = 1 by the difference of the probabilities.
    Scores are returned as logarithms, of which none underflows.
    """

    def __init__(self, config):
        self.beta = config.beta

    def __call__(self, teacher_logprobs: np.ndarray, student_logprobs: np.ndarray) -> np.ndarray:
        teacher = teacher_logprobs.astype(np.float64)
        student = student_logprobs.astype(np.float64)
        # Such tokens have nothing to teach; where both are -inf, the difference would be NaN.
        equal = teacher == student
        teacher, student = np.where(equal, 0, teacher), np.where(equal, -1, student)
        gap = np.abs(teacher - student)
        # log |p - q|, by the larger of the two.
        scores = self.beta * (np.maximum(teacher, student) + np.log(-np.expm1(-gap)))
        # 0 times the logarithm of an infinite gap would be NaN.
        if self.beta != 1:
            scores = scores + (1 - self.beta) * np.log(gap)
        return np.where(equal, -np.inf, scores)


def select_tokens(scores: np.ndarray, mask: np.ndarray, share: float) -> np.ndarray:
    """The unmasked tokens of highest score.

    Args:
        scores: [T] of a response.
        mask: [T] bool, the tokens that may be selected.
        share: of these, to select, rounded to the nearest count; one at least. Of equal scores the
            earlier token comes first.

    Returns:
        [T] bool.
    """
    places = np.flatnonzero(mask)
    count = max(1, round(share * len(places)))
    order = np.argsort(-scores[places], kind="stable")
    selected = np.zeros_like(mask)
    selected[places[order[:count]]] = True
    return selected
