"""What a run samples with: the rollout engine that fits its layout, and the requests it is
given."""

from __future__ import annotations

from typing import Callable, Sequence

import torch

from recipes.components import ENGINES
from rollouts.data.examples import Prompt
from rollouts.pretrained import token_count
from rollouts.simultaneous.decision import SimultaneousSampling, word_starts
from rollouts.streaming.interleaved import InterleavedEngine
from rollouts.streaming.tokens import Protocol, StreamingSampling
from rollouts.trajectory import Request, Sampling


def make_engine(
    config, device: torch.device, dtype: torch.dtype, max_length: int, path: str | None = None
):
    """`rollout.engine` with the weights of `path` (None: `model.path`), wrapped where
    `streaming.layout` is interleaved."""
    engine = ENGINES.resolve(config.rollout.engine)(
        path or config.model.path, config, device, dtype, max_length=max_length
    )
    return InterleavedEngine(engine) if config.streaming.layout == "interleaved" else engine


def make_requests(
    prompts: Sequence[Prompt], samples: int, seed: Callable[[int, int], int]
) -> list[Request]:
    """`samples` requests per prompt, adjacent; `seed` is of a prompt's index and a sample's."""
    return [
        Request(p.index, s, p.token_ids, seed(p.index, s), p.segments, p.opening, p.example.frames)
        for p in prompts
        for s in range(samples)
    ]


def make_sampling(config, tokenizer, stop_ids: Sequence[int], **options) -> Sampling:
    """A `Sampling` with the given limit, temperature and truncation; a streaming one ends thoughts
    on <EOT> or <skip>, and the deep segment also on <EOA>; a simultaneous one is still without a
    head. Ids are those that the tokenizer has, or those below `vocab`."""
    if "vocab" not in options:
        options["vocab"] = token_count(tokenizer)
    if config.streaming.layout is None:
        return Sampling(stop_ids=tuple(stop_ids), **options)
    if config.streaming.layout == "scheduled":
        starts = word_starts(tokenizer)
        starts[list(stop_ids)] = True  # to stop is a decision too
        return SimultaneousSampling(
            stop_ids=tuple(stop_ids),
            word_starts=starts,
            whole_words=config.proactive.whole_words,
            max_reads=config.proactive.max_reads,
            min_lag=config.proactive.min_lag,
            max_lag=config.proactive.max_lag,
            **options,
        )
    protocol = Protocol.of(tokenizer)
    return StreamingSampling(
        stop_ids=tuple(dict.fromkeys([*stop_ids, protocol.eoa])),
        close_id=protocol.eot,
        thought_stops=(protocol.eot, protocol.skip),
        max_thought_tokens=config.streaming.max_thought_tokens,
        **options,
    )


def written_tokens(config, prompt: Prompt) -> int:
    """The most that a prompt's completion can have besides the limit on new tokens: the opening and
    the thoughts."""
    if config.streaming.layout is None:
        return 0
    sentences = 0
    if config.streaming.layout != "scheduled":
        sentences = max(len(prompt.segments) - len(prompt.opening), 0)
    return sum(map(len, prompt.opening)) + sentences * config.streaming.max_thought_tokens
