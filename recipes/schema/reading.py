"""The keys of a model that reads its source bit by bit, and the engine that each layout needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recipes.errors import ConfigError
from recipes.schema.keys import as_text, key

# Values of streaming.layout that need a mask of their own, and the rollout engine of each.
MASKED_LAYOUTS = {"grouped": "streaming", "batch": "streaming", "scheduled": "simultaneous"}
PLAIN_ENGINES = ("vllm", "hf")


@dataclass(frozen=True)
class ReadingConfig:
    layout: str | None = key(None, "Attention of what is written. null: the model does not stream.")
    target_offset: int = key(
        0, "Position id of the first target token. Not used with layout=interleaved.", at_least=0
    )
    instruction: str = key(
        "", "Text of the first source segment, after the chat template's opening."
    )


def check(config: Any) -> None:
    """Refuse a rollout engine that cannot sample with the layout of the run.

    Raises:
        ConfigError: one line that names the key.
    """
    streaming = getattr(config, "streaming", None)
    layout = None if streaming is None else streaming.layout
    right = (MASKED_LAYOUTS[layout],) if layout in MASKED_LAYOUTS else PLAIN_ENGINES
    others = {*PLAIN_ENGINES, *MASKED_LAYOUTS.values()} - set(right)
    engine = config.rollout.engine
    if engine not in others:
        return
    what = "without a streaming.layout"
    if streaming is not None:
        what = f"with streaming.layout={as_text(layout)}"
    raise ConfigError(
        f"rollout.engine={engine} cannot sample {what}; use rollout.engine={' or '.join(right)}"
    )
