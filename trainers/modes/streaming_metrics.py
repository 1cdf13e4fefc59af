"""What an evaluation of a streaming model reports besides accuracy: lengths, skipped sentences,
waiting."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import chain
from statistics import median
from typing import Sequence

import numpy as np

from rewards.metrics.latency import answer_latency, to_answer
from rewards.streaming import judge
from rollouts.data.examples import Prompt
from rollouts.layout import read_counts
from rollouts.streaming.tokens import Protocol
from rollouts.trajectory import Request, Sampling, Trajectory
from trainers.core.distributed import gather


def streaming_metrics(
    rollout,
    prompts: Sequence[Prompt],
    trajectories: Sequence[Trajectory],
    sampling: Sampling,
    config,
    tokenizer,
    stop_ids: Sequence[int],
) -> dict[str, float]:
    """Means over the completions of all ranks. A collective.

    Args:
        rollout: the engine, whose speed is measured where `streaming.seconds_per_token` is null.
            What is found is written there, so that the evaluations of a process differ by what was
            written and not by the clock.
        prompts: all that were evaluated.
        trajectories: this rank's, scored.
        sampling: what they were drawn with.

    Returns:
        `streaming_length_mean`, `deep_length_mean`: tokens, with those that end them, and the
            answer;
        `skip_frac`: the share of sentences with a lone <skip>;
        `wait_tokens`: source tokens read when the first thought that is no <skip> starts, else the
            deep segment;
        `latency_s`: from the last word to the answer's first token, simulated (rewards/metrics/latency.py);
        `seconds_per_token`: of that simulation.
    """
    streaming = config.streaming
    if streaming.seconds_per_token is None:
        streaming.seconds_per_token = gather(decoding_speed(rollout, prompts[0], sampling))[0]
    protocol, read_first = Protocol.of(tokenizer), streaming.layout == "batch"
    by_index = {prompt.index: prompt for prompt in prompts}
    words = {
        prompt.index: [
            len(tokenizer.decode(segment[:-1]).split())
            for segment in prompt.segments[len(prompt.opening) :]
        ]
        for prompt in prompts
    }
    rows = []
    for trajectory in trajectories:
        prompt = by_index[trajectory.prompt_index]
        stages = judge(
            trajectory,
            protocol,
            tokenizer.decode,
            stop_ids,
            sampling.max_thought_tokens,
            sampling.max_new_tokens,
        )
        tokens = np.append(
            stages.lengths,
            to_answer(trajectory.completion_ids[-stages.deep_length :], protocol.eor),
        )
        first = len(prompt.opening) + int(np.argmin(np.append(stages.skipped, False)))
        read = read_counts(
            "batch" if read_first else "grouped", [len(s) for s in prompt.segments], first + 1
        )[first]
        latency = answer_latency(
            words[prompt.index],
            tokens,
            60 / streaming.words_per_minute,
            streaming.seconds_per_token,
            read_first,
        )
        rows.append(
            (
                stages.lengths.sum(),
                stages.deep_length,
                read,
                latency,
                stages.skipped.sum(),
                len(stages.skipped),
            )
        )
    means = np.array(list(chain(*gather(rows))), dtype=float).mean(0).tolist()
    written, deep, read, latency, skipped, sentences = means
    return {
        "streaming_length_mean": written,
        "deep_length_mean": deep,
        "skip_frac": skipped / sentences,
        "wait_tokens": read,
        "latency_s": latency,
        "seconds_per_token": streaming.seconds_per_token,
    }


def decoding_speed(rollout, prompt: Prompt, sampling: Sampling, repeats: int = 5) -> float:
    """Seconds per token of one sequence decoded alone, the reading of its source left out: the
    median of a few."""
    opening = tuple(chain(*prompt.opening))
    # no thoughts, all deep
    request = Request(prompt.index, 0, prompt.token_ids, 0, (prompt.token_ids,), (opening,))
    thoughts = len(prompt.segments) - len(prompt.opening)
    # what the engine has room for
    count = min(32, thoughts * sampling.max_thought_tokens + sampling.max_new_tokens)

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        rollout.generate([request], replace(sampling, max_new_tokens=tokens, stop_ids=()))
        return time.perf_counter() - started

    seconds(count)  # what an engine does once, it does now
    return max(median((seconds(count) - seconds(1)) / (count - 1) for _ in range(repeats)), 1e-6)
