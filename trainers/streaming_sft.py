"""Streaming SFT, the cold start of streaming reasoners (StreamingThinker, arXiv 2510.17238).

Cross-entropy on thoughts, deep reasoning and answer, each token under the mask and positions that
it will have when the model writes it while reading (`streaming.layout`). The opening, which is
forced when the model writes, is not learned. A model without the protocol tokens is given them
first.

    torchrun --nproc_per_node=N train.py recipe=streaming_sft data.path=FILE
"""

from __future__ import annotations

from recipes.errors import ConfigError
from rollouts.data.examples import Prompt
from rollouts.layout import arrange
from rollouts.streaming.prompts import target_segments
from rollouts.trajectory import Trajectory
from trainers.sft import SupervisedFineTuning


class StreamingSFT(SupervisedFineTuning):
    """Token mean over the step's target tokens."""

    adds_tokens = True
    learns = ("thoughts", "final")

    @classmethod
    def check(cls, config) -> None:
        check_layout(config)

    def read(self, prompt: Prompt) -> Trajectory:
        streaming, tokenizer = self.config.streaming, self.run.tokenizer
        written = target_segments(prompt.example, tokenizer)
        return Trajectory(
            prompt.index,
            0,
            finish_reason="stop",
            prompt=prompt.text,
            answer=prompt.example.answer,
            completion=tokenizer.decode([token for segment in written for token in segment]),
            **arrange(
                streaming.layout,
                prompt.segments,
                prompt.opening,
                written,
                offset=streaming.target_offset,
            ),
        )


def check_layout(config) -> None:
    """Raises ConfigError: a streaming recipe without a layout."""
    if config.streaming.layout is None:
        raise ConfigError(
            f"streaming.layout=null: recipe={config.recipe} needs grouped, interleaved or batch"
        )
