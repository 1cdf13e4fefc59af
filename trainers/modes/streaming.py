"""Thinking while reading: a thought after each sentence, then the deep segment with the answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from statistics import median
from typing import Any

import numpy as np

from recipes.languages import words as words_of
from rewards.metrics.latency import answer_latency, to_answer
from rewards.streaming import Stages, score_stages
from rollouts.data.examples import Example, Prompt
from rollouts.engines.base import Engine
from rollouts.layout import read_counts
from rollouts.pretrained import vocabulary
from rollouts.streaming.interleaved import InterleavedEngine
from rollouts.streaming.prompts import streaming_prompts
from rollouts.streaming.tokens import Protocol, StreamingSampling
from rollouts.trajectory import Request, Trajectory
from trainers.core.distributed import gather
from trainers.core.rundir import recorded
from trainers.modes.plain import Plain

SPEED_REPEATS = 5  # decoding speed is the median of this many measurements
SPEED_TOKENS = 32  # tokens decoded in one of them
PARITY_THOUGHT_TOKENS = 6  # of a thought that the parity gate draws


class Streaming(Plain):
    """`streaming.layout` grouped, batch or interleaved (docs/specification.md, 3)."""

    sources = "sources and thoughts"

    def __init__(self, config):
        super().__init__(config)
        self.layout = config.streaming.layout
        # Interleaved sequences are plain causal ones.
        self.masked = self.layout != "interleaved"
        # Seconds per token of the simulated writer. Measured once, so that the evaluations of a
        # process differ by what was written and not by the clock.
        self.seconds_per_token: float | None = config.streaming.seconds_per_token

    def prompts(
        self, examples: Sequence[Example], tokenizer, where: str
    ) -> tuple[list[Prompt], int]:
        return streaming_prompts(examples, tokenizer, self.config, where)

    def extra_tokens(self, prompt: Prompt) -> int:
        thoughts = max(len(prompt.segments) - len(prompt.opening), 0)
        longest = self.config.streaming.max_thought_tokens
        return sum(map(len, prompt.opening)) + thoughts * longest

    def wrap(self, engine: Engine) -> Engine:
        return engine if self.masked else InterleavedEngine(engine)

    def sampling(self, tokenizer, stop_ids: Sequence[int], **limits) -> StreamingSampling:
        """Thoughts end on <EOT> or <skip>, the deep segment on an end token or <EOA>."""
        if "vocab" not in limits:
            limits["vocab"], limits["missing"] = vocabulary(tokenizer)
        protocol = Protocol.of(tokenizer)
        return StreamingSampling(
            stop_ids=tuple(dict.fromkeys([*stop_ids, protocol.eoa])),
            close_id=protocol.eot,
            thought_stops=(protocol.eot, protocol.skip),
            max_thought_tokens=self.config.streaming.max_thought_tokens,
            **limits,
        )

    def parity_sampling(self, run, max_new_tokens: int) -> StreamingSampling:
        sampling = super().parity_sampling(run, max_new_tokens)
        longest = min(sampling.max_thought_tokens, PARITY_THOUGHT_TOKENS)
        return replace(sampling, max_thought_tokens=longest)

    def judged_text(self, trajectory: Trajectory, tokenizer) -> str:
        """The deep segment."""
        slots = trajectory.slots
        before_deep = int((slots < slots[-1]).sum())
        return tokenizer.decode(self.text_ids(trajectory)[before_deep:])

    def metrics(
        self, run, trajectories: Sequence[Trajectory], sampling: StreamingSampling
    ) -> dict[str, float]:
        """Means over the completions of all ranks.

        Returns:
            `streaming_length_mean`, `deep_length_mean`: tokens, with those that end them, and the
                answer;
            `skip_frac`: the share of sentences with a lone <skip>;
            `wait_tokens`: source tokens read when the first thought that is no <skip> starts, else
                the deep segment;
            `latency_s`: from the last word to the answer's first token, simulated
                (rewards/metrics/latency.py);
            `seconds_per_token`: of that simulation.
        """
        if self.seconds_per_token is None and run.start:
            # The latencies of a resumed run are of one clock.
            name = f"eval/{run.eval_name}/seconds_per_token"
            self.seconds_per_token = gather(recorded(run.directory, name))[0]
        if self.seconds_per_token is None:
            speed = decoding_speed(run.rollout, run.eval_prompts[0], sampling)
            self.seconds_per_token = gather(speed)[0]
        protocol = Protocol.of(run.tokenizer)
        by_index = {prompt.index: prompt for prompt in run.eval_prompts}
        words = {index: sentence_words(p, run.tokenizer) for index, p in by_index.items()}
        rows = []
        for trajectory in trajectories:
            prompt = by_index[trajectory.prompt_index]
            stages = score_stages(
                trajectory,
                protocol,
                run.tokenizer.decode,
                run.stop_ids,
                sampling.max_thought_tokens,
                sampling.max_new_tokens,
            )
            deep_ids = trajectory.completion_ids[-stages.deep_length :]
            to_first_answer = to_answer(deep_ids, protocol.eor)
            rows.append(
                (
                    stages.lengths.sum(),
                    stages.deep_length,
                    self._tokens_read(prompt, stages),
                    self._latency(words[prompt.index], stages, to_first_answer),
                    stages.skipped.sum(),
                    len(stages.skipped),
                )
            )
        means = np.array(list(chain(*gather(rows))), dtype=float).mean(0).tolist()
        streamed, deep, read, latency, skipped, sentences = means
        return {
            "streaming_length_mean": streamed,
            "deep_length_mean": deep,
            "skip_frac": skipped / sentences,
            "wait_tokens": read,
            "latency_s": latency,
            "seconds_per_token": self.seconds_per_token,
        }

    def _tokens_read(self, prompt: Prompt, stages: Stages) -> int:
        """Source tokens read when the first thought that is no <skip> starts."""
        first = len(prompt.opening) + int(np.argmin(np.append(stages.skipped, False)))
        layout = "batch" if self.layout == "batch" else "grouped"
        return read_counts(layout, [len(s) for s in prompt.segments], first + 1)[first]

    def _latency(self, words: Sequence[int], stages: Stages, to_answer: int) -> float:
        """Seconds from the last word to the answer's first token; `words` of each sentence."""
        return answer_latency(
            words,
            np.append(stages.lengths, to_answer),
            60 / self.config.streaming.words_per_minute,
            self.seconds_per_token,
            self.layout == "batch",
        )

    def summary(self, scores: dict[str, Any]) -> str:
        return (
            f"deep {scores['deep_length_mean']:.1f}  skipped {scores['skip_frac']:.1%}  "
            f"latency {scores['latency_s']:.2f} s  "
        )


def sentence_words(prompt: Prompt, tokenizer) -> list[int]:
    """The number of words of each sentence that is read; without spaces, of characters."""
    sentences = prompt.segments[len(prompt.opening) :]
    return [len(words_of(tokenizer.decode(segment[:-1]))) for segment in sentences]


def decoding_speed(engine: Engine, prompt: Prompt, sampling: StreamingSampling) -> float:
    """Seconds per token of one sequence decoded alone, without the reading of its source."""
    opening = tuple(chain(*prompt.opening))
    # The whole source is one segment of the opening: no thoughts, all deep.
    request = Request(prompt.index, 0, prompt.token_ids, 0, (prompt.token_ids,), (opening,))
    thoughts = len(prompt.segments) - len(prompt.opening)
    # The engine has room for this many.
    room = thoughts * sampling.max_thought_tokens + sampling.max_new_tokens
    count = min(SPEED_TOKENS, room)

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        engine.generate([request], replace(sampling, max_new_tokens=tokens, stop_ids=()))
        return time.perf_counter() - started

    seconds(count)  # what an engine does once, it does now
    per_token = [(seconds(count) - seconds(1)) / (count - 1) for _ in range(SPEED_REPEATS)]
    return max(median(per_token), 1e-6)
