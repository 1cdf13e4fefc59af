"""Decision heads: whether to write what a model proposes, or to read on first (ProactiveLLM, arXiv
2606.00523).

A head needs no training and changes nothing in the model. After each unit that is read the model
proposes its next token; the head says of each row whether it is written (methods.md, 5). At the end
of the input all is written, whatever the head says. Entropy and attention heads write where their
score is at most a threshold, which is best a quantile of the scores that a calibration set has with
the whole input read: "as sure as it mostly is when it knows all".

A head of your own is a class with `writes`, registered here, or named by its dotted path in
`proactive.head`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from recipes.components import DECISION_HEADS
from recipes.errors import ConfigError, DataError
from rollouts.pretrained import token_count
from rollouts.trajectory import Sampling


@dataclass
class State:
    """B rows, each with a proposal. Units are those of the source; words those of the target."""

    logits: torch.Tensor  # [B, V] float32, of the proposal
    read: torch.Tensor  # [B] units read, 1 or more
    written: torch.Tensor  # [B] words written in full, before the one that the proposal is of
    finished: torch.Tensor  # [B] bool: the input is over
    # [B] bool: the head's word counts, unless the input is over; not inside words (`whole_words`)
    asked: torch.Tensor
    # [layers, B, heads, units] of the row that proposes, on each unit's tokens
    attention: torch.Tensor | None = None


class Head:
    """Base of decision heads.

    Args:
        setting: what is swept in a latency-quality curve: a threshold, a k, a ratio.

    Raises:
        ConfigError: it is out of range.
    """

    needs_attention = False  # of the proposing row; costs the fast attention kernels
    calibrated = False  # has `score`, and a setting that can be a quantile of it
    needs_setting = True
    # held between `proactive.min_lag`, `max_lag` and `max_reads`; else a policy of its own
    adaptive = True
    # settings of a latency-quality curve; of a calibrated head these are quantiles
    sweep: tuple[float, ...] = ()
    low, high, what = -math.inf, math.inf, "any number"

    def __init__(self, setting: float):
        if not self.low <= setting <= self.high:
            raise ConfigError(f"proactive.setting={setting:g} must be {self.what} for this head")
        self.setting = setting

    def writes(self, state: State) -> torch.Tensor:
        """[B] bool: write the proposal. By default, where its score is at most the setting."""
        return self.score(state) <= self.setting

    def score(self, state: State) -> torch.Tensor:
        """[B]: the lower, the readier to write."""
        raise TypeError(f"{type(self).__name__} has no score")


class Entropy(Head):
    """The entropy of the next token, nats."""

    calibrated = True
    low, what = 0.0, "0 or more (nats)"

    def score(self, state: State) -> torch.Tensor:
        logprobs = state.logits.log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)


class Attention(Head):
    """1 less the attention that falls on the unit which has most of it, averaged over layers and
    heads [choice].

    Attention is not normalised over what has been read: where a model misses what it needs, it
    attends to the frame and to its own words instead."""

    needs_attention = calibrated = True
    low, high, what = 0.0, 1.0, "between 0 and 1"

    def score(self, state: State) -> torch.Tensor:
        return 1 - state.attention.amax(-1).mean((0, 2))


class NewestAttention(Head):
    """The part of the attention to the source that falls on the newest unit, averaged over layers
    and heads.

    A word that leans on what has just come may need what comes next (EDAtt, arXiv 2212.07850; units
    for its frames, and the last one only, are our choices). A quantile with all read would say
    nothing, so its setting is given."""

    needs_attention = True
    low, high, what = 0.0, 1.0, "between 0 and 1"
    sweep = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)

    def score(self, state: State) -> torch.Tensor:
        attention = state.attention.mean((0, 2))
        return attention.gather(-1, state.read[:, None] - 1)[:, 0] / attention.sum(-1)


class WaitK(Head):
    """Read k units, then write a word for each further one (arXiv 1810.08398)."""

    adaptive = False
    low, what = 1, "1 or more (units)"
    sweep = tuple(map(float, range(1, 10)))

    def writes(self, state: State) -> torch.Tensor:
        return state.read >= self.setting + state.written


class Ratio(Head):
    """Read so many units for each word."""

    adaptive = False
    low, what = 1e-6, "above 0 (units per word)"
    sweep = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)

    def writes(self, state: State) -> torch.Tensor:
        return state.read >= self.setting * (state.written + 1)


class Batch(Head):
    """Read all, then write."""

    needs_setting = adaptive = False
    sweep = (0.0,)

    def writes(self, state: State) -> torch.Tensor:
        return state.finished


@dataclass(frozen=True)
class SimultaneousSampling(Sampling):
    """How a simultaneous completion is drawn."""

    # Decides whether to write or to read on; None until it is calibrated.
    head: Head | None = None
    # [V] bool: the tokens that begin a word.
    word_starts: np.ndarray | None = None
    # The head is asked where a word begins, and not inside.
    whole_words: bool = True
    # Write after this many units were read in a row; None: no limit.
    max_reads: int | None = None
    # Never write before this many units more than words have been read.
    min_lag: int = 0
    # Write when this many units more than words have been read; None: no limit.
    max_lag: int | None = None


def check_heads(options) -> None:
    """Refuse decision heads that cannot be used, before anything is loaded.

    Args:
        options: the config's section `proactive`.

    Raises:
        ConfigError: the head is not known, its setting is missing or out of range, there is nothing
            to sweep, or no lag is between the least and the largest.
    """
    if options.max_lag is not None and options.max_lag < options.min_lag:
        raise ConfigError(
            f"proactive.max_lag={options.max_lag} must be at least proactive.min_lag={options.min_lag}"
        )
    kind = DECISION_HEADS.resolve(options.head)
    if options.setting is not None:
        kind(options.setting)
    elif kind.needs_setting and not kind.calibrated:
        raise ConfigError(f"proactive.head={options.head} needs proactive.setting: {kind.what}")
    for name in options.curve:
        kind = DECISION_HEADS.resolve(name)
        if not (kind.calibrated or kind.sweep):
            raise ConfigError(
                f"proactive.curve={name}: its class has neither a score nor a sweep; give one"
            )


class Recorder(Head):
    """Reads all and keeps the scores that a head gives where it would be asked, with the whole
    input read."""

    adaptive = False

    def __init__(self, head: Head):
        self.head, self.needs_attention, self.scores = head, head.needs_attention, []

    def writes(self, state: State) -> torch.Tensor:
        self.scores += self.head.score(state)[state.finished & state.asked].tolist()
        return state.finished

    def quantile(self, share: float) -> float:
        """The score that this share of them does not exceed.

        Raises:
            DataError: there are none.
        """
        if not self.scores:
            raise DataError(
                "proactive.calibration_path: nothing to calibrate the decision head on; give data with "
                "rows, or set proactive.setting"
            )
        return float(torch.tensor(self.scores, dtype=torch.float64).quantile(share))


def word_starts(tokenizer) -> np.ndarray:
    """[V] bool: the tokens that begin a word, i.e. with a space, and the special ones."""
    tokens = tokenizer.convert_ids_to_tokens(range(token_count(tokenizer)))
    special = set(tokenizer.all_special_ids)
    return np.array(
        [
            index in special or (token or "").startswith(("\u0120", "\u2581", " "))
            for index, token in enumerate(tokens)
        ]
    )
