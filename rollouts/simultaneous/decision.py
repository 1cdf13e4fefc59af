"""Decision heads: whether to write what a model proposes, or to read on first.

They are those of ProactiveLLM (arXiv 2606.00523; docs/specification.md, 5.3). A head needs no
training and changes nothing in the model. After each unit that is read the model proposes its next
token. The head says of each row whether the proposal is written. Once the input is over everything
is written, whatever the head says.

Entropy and attention heads write where their score is at most a threshold. The threshold is best a
quantile of the scores that a calibration set has with the whole input read: "as sure as it mostly
is when it knows all".

A head of your own is a class with `writes`. It has a line in `recipes.components.DECISION_HEADS`,
or `proactive.head` names it by its dotted path.

Letters: B rows, V vocabulary, M units of a source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recipes.components import DECISION_HEADS
from recipes.errors import ConfigError, DataError
from recipes.languages import begun
from rollouts.pretrained import token_count
from rollouts.trajectory import Sampling


@dataclass
class State:
    """B rows, each with a proposal. Units are those of the source, words those of the target."""

    logits: Tensor  # [B, V] float32, of the proposal
    read: Tensor  # [B] units read, 1 or more
    written: Tensor  # [B] words written in full, before the word of the proposal
    finished: Tensor  # [B] bool: the input is over
    # [B] bool: the head decides here. With `whole_words` it does not decide inside words.
    asked: Tensor
    # [layers, B, heads, M] of the token that proposes, on the tokens of each unit
    attention: Tensor | None = None


class DecisionHead:
    """Base of decision heads.

    Args:
        setting: what a latency-quality curve sweeps: a threshold, a k, a ratio.

    Raises:
        ConfigError: the setting is out of range.
    """

    # The head reads `State.attention`. That rules out the fast attention kernels.
    needs_attention = False
    # The head has a `score`, and its setting can be a quantile of the scores.
    calibrated = False
    needs_setting = True
    # `proactive.min_lag`, `max_lag` and `max_reads` bound the head. Else it is a whole policy.
    adaptive = True
    # Settings of a latency-quality curve. For a calibrated head these are quantiles.
    sweep: tuple[float, ...] = ()
    # Bounds of the setting, and how an error names them.
    low: float = -math.inf
    high: float = math.inf
    what: str = "any number"

    def __init__(self, setting: float):
        if not self.low <= setting <= self.high:
            raise ConfigError(f"proactive.setting={setting:g} must be {self.what} for this head")
        self.setting = setting

    def writes(self, state: State) -> Tensor:
        """[B] bool: write the proposal. By default, where its score is at most the setting."""
        return self.score(state) <= self.setting

    def score(self, state: State) -> Tensor:
        """[B]: the lower, the readier to write."""
        raise TypeError(f"{type(self).__name__} has no score")


class Entropy(DecisionHead):
    """The entropy of the next token, nats."""

    calibrated = True
    low, what = 0.0, "0 or more (nats)"

    def score(self, state: State) -> Tensor:
        logprobs = state.logits.log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)


class Attention(DecisionHead):
    """1 less the attention on the unit that has most of it, a mean over layers and heads [choice].

    Attention is not normalised over what has been read. A model that misses what it needs attends
    to the frame and to its own words instead.
    """

    needs_attention = calibrated = True
    low, high, what = 0.0, 1.0, "between 0 and 1"

    def score(self, state: State) -> Tensor:
        return 1 - state.attention.amax(-1).mean((0, 2))


class NewestAttention(DecisionHead):
    """The newest unit's part of the attention to the source, a mean over layers and heads.

    A word that leans on what has just come may need what comes next (EDAtt, arXiv 2212.07850).
    Units instead of frames, and the last unit only, are our choices [choice]. A quantile with all
    read would say nothing, so the setting must be set.
    """

    needs_attention = True
    low, high, what = 0.0, 1.0, "between 0 and 1"
    sweep = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)

    def score(self, state: State) -> Tensor:
        attention = state.attention.mean((0, 2))
        return attention.gather(-1, state.read[:, None] - 1)[:, 0] / attention.sum(-1)


class WaitK(DecisionHead):
    """Read k units, then write a word for each further one (arXiv 1810.08398)."""

    adaptive = False
    low, what = 1, "1 or more (units)"
    sweep = tuple(map(float, range(1, 10)))

    def writes(self, state: State) -> Tensor:
        return state.read >= self.setting + state.written


class Ratio(DecisionHead):
    """Read so many units for each word."""

    adaptive = False
    low, what = 1e-6, "above 0 (units per word)"
    sweep = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)

    def writes(self, state: State) -> Tensor:
        return state.read >= self.setting * (state.written + 1)


class Batch(DecisionHead):
    """Read all, then write."""

    needs_setting = adaptive = False
    sweep = (0.0,)

    def writes(self, state: State) -> Tensor:
        return state.finished


@dataclass(frozen=True)
class SimultaneousSampling(Sampling):
    """How a simultaneous completion is drawn."""

    # Decides whether to write or to read on. None until it is calibrated.
    head: DecisionHead | None = None
    # [V] bool: the tokens that begin a word; or [V] int, how many words each begins.
    word_starts: np.ndarray | None = None
    # The head decides where a word begins, and not inside words.
    whole_words: bool = True
    # Write after this many units were read in a row. None: no limit.
    max_reads: int | None = None
    # Never write before this many units more than words have been read.
    min_lag: int = 0
    # Write once this many units more than words have been read. None: no limit.
    max_lag: int | None = None


def decide(sampling: SimultaneousSampling, state: State, waited: Tensor) -> Tensor:
    """Whether each row writes its proposal: what the head says, within the bounds of the lag.

    Args:
        sampling: the head and its bounds.
        state: of B rows.
        waited: [B] units read since the last token was written.

    Returns:
        [B] bool.
    """
    write = sampling.head.writes(state)
    if sampling.head.adaptive:
        lag = state.read - state.written
        if sampling.max_lag is not None:
            write = write | (lag >= sampling.max_lag)
        if sampling.max_reads is not None:
            write = write | (waited >= sampling.max_reads)
        write = write & (lag >= sampling.min_lag)
    return write | state.finished | ~state.asked


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
            f"proactive.max_lag={options.max_lag} must be at least "
            f"proactive.min_lag={options.min_lag}"
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


class Recorder(DecisionHead):
    """Reads everything first, and records the scores that another head has at its decisions."""

    adaptive = False

    def __init__(self, head: DecisionHead):
        self.head, self.needs_attention = head, head.needs_attention
        self.scores: list[float] = []

    def writes(self, state: State) -> Tensor:
        self.scores += self.head.score(state)[state.finished & state.asked].tolist()
        return state.finished

    def quantile(self, share: float) -> float:
        """The score that this share of the scores does not exceed.

        Raises:
            DataError: there are no scores.
        """
        if not self.scores:
            raise DataError(
                "proactive.calibration_path: nothing to calibrate the decision head on; "
                "give data with rows, or set proactive.setting"
            )
        return float(torch.tensor(self.scores, dtype=torch.float64).quantile(share))


def word_starts(tokenizer) -> np.ndarray:
    """[V] bool: the tokens that begin a word, which are special or have a leading space."""
    tokens = tokenizer.convert_ids_to_tokens(range(token_count(tokenizer)))
    special = set(tokenizer.all_special_ids)
    # A space as byte-level and as SentencePiece vocabularies spell it, and a plain one.
    spaces = ("\u0120", "\u2581", " ")
    return np.array(
        [index in special or (token or "").startswith(spaces) for index, token in enumerate(tokens)]
    )


def character_starts(tokenizer) -> np.ndarray:
    """[V] int: how many words each token begins in a language without spaces.

    Words are characters there (recipes/languages.py). A token may begin several, and a token that
    is a later part of a character's bytes begins none. What a token begins depends a little on the
    one before it, which is not looked at: a word of another script begins after white space only.
    A special token begins one.
    """
    special = set(tokenizer.all_special_ids)
    return np.array(
        [1 if index in special else begun(text) for index, text in enumerate(spellings(tokenizer))]
    )


def spellings(tokenizer) -> list[str]:
    """The text of each token [V]. Joined, those of a text are as long as the text.

    Of a character whose bytes are several tokens, the first has a sign in its place, and the others
    have none.
    """
    entries = tokenizer.convert_ids_to_tokens(range(token_count(tokenizer)))
    spaced = tokenizer.convert_ids_to_tokens(tokenizer(" b", add_special_tokens=False).input_ids)
    if not any("\u0120" in entry for entry in spaced):
        return [(entry or "").replace("\u2581", " ") for entry in entries]
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    values = {sign: byte for byte, sign in bytes_to_unicode().items()}
    # 10xxxxxx goes on with a character.
    later = bytes(range(0x80, 0xC0))

    def spell(entry: str) -> str:
        if not set(entry) <= values.keys():
            return entry  # an added token, which is text
        written = bytes(values[sign] for sign in entry)
        return written.lstrip(later).decode("utf-8", "replace")

    return [spell(entry or "") for entry in entries]
