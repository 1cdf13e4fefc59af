"""Streaming SFT, the cold start of streaming reasoners (StreamingThinker, arXiv 2510.17238).

It is cross-entropy on thoughts, deep reasoning and answer. Each token has the mask and the position
that it will have when the model writes it while reading (`streaming.layout`). The opening is not
learned, because it is forced when the model writes. A model without the protocol tokens gets them
first.

    torchrun --nproc_per_node=N train.py recipe=streaming_sft data.path=FILE
"""

from __future__ import annotations

from rollouts.data.examples import Prompt
from rollouts.layout import arrange
from rollouts.streaming.prompts import target_segments
from rollouts.trajectory import Trajectory
from trainers.run import Run
from trainers.sft import SupervisedFineTuning


class StreamingSFT(SupervisedFineTuning):
    """Cross-entropy on thoughts and answers, averaged over the target tokens of the step."""

    adds_tokens = True
    layouts = ("grouped", "interleaved", "batch")
    learns = ("thoughts", "final")

    @classmethod
    def target_length(cls, prompt: Prompt, run: Run) -> int:
        return sum(map(len, target_segments(prompt.example, run.tokenizer)))

    def read(self, prompt: Prompt) -> Trajectory:
        streaming, tokenizer = self.config.streaming, self.run.tokenizer
        targets = target_segments(prompt.example, tokenizer)
        sequence = arrange(
            streaming.layout,
            prompt.segments,
            prompt.opening,
            targets,
            offset=streaming.target_offset,
        )
        return Trajectory(
            prompt_index=prompt.index,
            sample_index=0,
            finish_reason="stop",
            prompt=prompt.text,
            answer=prompt.example.answer,
            completion=tokenizer.decode([token for segment in targets for token in segment]),
            **sequence,
        )
