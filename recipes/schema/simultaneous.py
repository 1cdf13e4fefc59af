"""The keys of a model that writes while it reads, when a decision head says so."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recipes.components import DECISION_HEADS
from recipes.errors import ConfigError
from recipes.schema.common import Config, EvalConfig, ModelConfig
from recipes.schema.keys import as_text, key
from recipes.schema.reading import ReadingConfig


@dataclass(frozen=True)
class SimultaneousModelConfig(ModelConfig):
    encoder: str | None = key(
        None,
        "Dotted path of the callable that makes the encoder of frames "
        "(rollouts/simultaneous/frames.py). null: sources are text.",
    )


@dataclass(frozen=True)
class SimultaneousStreamingConfig(ReadingConfig):
    layout: str | None = key(
        None,
        "Attention of the target. scheduled: a target token sees the units that were read when it "
        "was written.",
        choices=(None, "scheduled"),
    )
    unit: str = key(
        "word",
        "Unit in which a text is read. In a language without spaces, a word is a character.",
        choices=("word", "sentence"),
    )
    source_language: str | None = key(
        None,
        "Language of the text that is read, as its code: en, zh, ja, … null: that which "
        "data.prompt_column has as its name.",
    )
    target_language: str | None = key(
        None,
        "Language of the text that is written. null: that which data.target_column has as its "
        "name. Words of the target, and so lags and schedules, are characters in a language "
        "without spaces (zh, ja, th, lo, km, my, bo, …).",
    )
    unit_seconds: float = key(
        0.5, "Length of the unit in which a source of frames is read, seconds.", above=0
    )


@dataclass(frozen=True)
class SimultaneousEvalConfig(EvalConfig):
    bleu_tokenizer: str | None = key(
        None,
        "Tokenizer of sacrebleu's BLEU: 13a, zh, ja-mecab, ko-mecab, char, intl, flores200, … "
        "null: the one for the target's language, 13a where that is not known.",
    )


@dataclass(frozen=True)
class ProactiveConfig:
    batch_weight: float = key(
        1.0, "Weight of the cross-entropy with the whole source in view.", at_least=0
    )
    stream_weight: float = key(1.0, "Weight of the cross-entropy under read schedules.", at_least=0)
    kl_weight: float = key(
        0.05,
        "Lambda: weight of the KL from the view under a schedule to the view of the whole source, "
        "which teaches.",
        at_least=0,
    )
    top_k: int = key(
        100, "Number of the teaching view's most likely tokens that the KL is taken on.", at_least=1
    )
    top_k_tail: str = key(
        "renormalize",
        "What the other tokens are in the KL. renormalize: left out. bucket: one token together.",
        choices=("renormalize", "bucket"),
    )
    schedules: int = key(1, "m: number of read schedules per example and step.", at_least=1)
    schedule: str = key(
        "uniform",
        "How a schedule spreads the reading over the words. uniform: evenly, at random. early, "
        "late: more at the start, or at the end. diagonal: evenly, with the least variance.",
        choices=("uniform", "early", "late", "diagonal"),
    )
    head: str = key(
        "entropy", "Decision head: whether to write or to read on.", component=DECISION_HEADS
    )
    setting: float | None = key(
        None,
        "Threshold, k or ratio of the head. null: a quantile of its scores on a calibration set.",
    )
    quantile: float = key(
        0.9, "Quantile of the calibration set's scores that a head uses.", at_least=0, at_most=1
    )
    calibration_path: str | None = key(None, "Calibration data. null: data.path.")
    calibration_size: int = key(200, "Number of examples in the calibration set.", at_least=1)
    max_reads: int | None = key(
        None, "Write after this many units were read in a row. null: no limit.", at_least=1
    )
    min_lag: int = key(
        0,
        "Never write before this many units more than words have been read. wait_k, ratio and "
        "batch do not use it.",
        at_least=0,
    )
    max_lag: int | None = key(
        None,
        "Write when this many units more than words have been read. null: no limit.",
        at_least=1,
    )
    curve: tuple[str, ...] = key(
        (),
        "Heads that are swept over their settings when training ends.",
        component=DECISION_HEADS,
    )
    whole_words: bool = key(True, "Ask the head where a word begins, and not inside.")


@dataclass(frozen=True)
class Simultaneous(Config):
    """The config of a run whose model writes while it reads."""

    model: SimultaneousModelConfig = field(default_factory=SimultaneousModelConfig)
    streaming: SimultaneousStreamingConfig = field(default_factory=SimultaneousStreamingConfig)
    proactive: ProactiveConfig = field(default_factory=ProactiveConfig)
    eval: SimultaneousEvalConfig = field(default_factory=SimultaneousEvalConfig)


def check(config: Any) -> None:
    """Refuse a sweep of decision heads where none is asked.

    Raises:
        ConfigError: one line that names the key.
    """
    if not hasattr(config, "proactive"):
        return
    if config.proactive.curve and config.streaming.layout != "scheduled":
        raise ConfigError(
            f"proactive.curve={as_text(config.proactive.curve)} needs streaming.layout=scheduled, "
            "as in recipe=proactivellm"
        )
