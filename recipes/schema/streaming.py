"""The keys of a model that thinks while it reads."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.schema.common import Config
from recipes.schema.keys import key
from recipes.schema.reading import ReadingConfig


@dataclass(frozen=True)
class StreamingConfig(ReadingConfig):
    layout: str | None = key(
        None,
        "Attention of the thoughts. grouped: each sees the sentences read before it, by a mask and "
        "positions of its own. batch: the same, but all is read before the first. interleaved: "
        "sentences and thoughts in order of arrival, plain causal. null: it does not stream.",
        choices=(None, "grouped", "batch", "interleaved"),
    )
    max_thought_tokens: int = key(
        24, "Length of the longest thought of a sentence, its closing token included.", at_least=2
    )
    restate_question: bool = key(
        False, "Repeat the question as the forced first tokens of the target."
    )
    words_per_minute: float = key(150.0, "Pace of the simulated reader.", above=0)
    seconds_per_token: float | None = key(
        None, "Pace of the simulated writer. null: measured.", above=0
    )


@dataclass(frozen=True)
class Streaming(Config):
    """The config of a run whose model thinks while it reads."""

    streaming: StreamingConfig = field(default_factory=StreamingConfig)
