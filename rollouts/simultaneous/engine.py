"""Simultaneous generation: read a unit or write a token, as a decision head says (ProactiveLLM,
arXiv 2606.00523).

A row proposes its next token from what it has read. If the head is for it, the token is written; if
not, the proposal is dropped and one unit more is read (methods.md, 5). The source does not see the
target, so it is encoded at once, and to read on is to run the last target token again with more of
the source in view; the keys of its earlier run are hidden from then on. So each row's key is that
of the view which its successor was written with, as in training (rollouts/layout.py,
`from_visible`), and the log-probs are those of one masked forward."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch

from rollouts.engines.huggingface import sample
from rollouts.layout import PADDING, SOURCE, from_visible
from rollouts.simultaneous.decision import State
from rollouts.simultaneous.frames import embed, load_encoder
from rollouts.streaming.engine import Cache, StreamingEngine
from rollouts.trajectory import Request, Sampling, Trajectory

BEYOND = 2**40  # more than any source has


class SimultaneousEngine(StreamingEngine):
    """Batched reading and writing. Requests have segments [frame, unit 1, …, unit M] and an
    opening; the sampling has a `head` and `word_starts`. Trajectories get `reads`."""

    def __init__(self, path: str, config, device: torch.device, dtype: torch.dtype, **rest):
        super().__init__(path, config, device, dtype, **rest)
        self.attention = self.model.config._attn_implementation
        self.encoder = load_encoder(config.model.encoder, device) if config.model.encoder else None

    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        head, device, count = sampling.head, self.device, len(requests)
        self.model.set_attn_implementation("eager" if head.needs_attention else self.attention)
        starts = torch.from_numpy(sampling.word_starts).to(device)
        stops = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        units = torch.tensor([len(r.segments) - 1 for r in requests], device=device)
        ends = torch.nn.utils.rnn.pad_sequence(  # [B, 1 + M] source tokens read after so many units
            [torch.tensor([len(s) for s in r.segments]).cumsum(0) for r in requests],
            batch_first=True,
            padding_value=BEYOND,
        ).to(device)
        uniforms = torch.stack(
            [
                torch.rand(
                    sampling.max_new_tokens,
                    generator=torch.Generator().manual_seed(r.seed),
                    dtype=torch.float64,
                )
                for r in requests
            ]
        ).to(device)
        cache = self._encode(requests)
        # index of what is to come
        first = torch.tensor([sum(map(len, r.opening)) for r in requests], device=device)
        pending = torch.tensor([r.opening[-1][-1] for r in requests], device=device)
        tokens = torch.zeros(count, sampling.max_new_tokens, dtype=torch.long, device=device)
        reads, logprobs = torch.zeros_like(tokens), torch.zeros(tokens.shape, device=device)
        length, stopped = (
            torch.zeros_like(units),
            torch.zeros(count, dtype=torch.bool, device=device),
        )
        # rows of `requests` still writing; those below have a row for each
        live = torch.arange(count, device=device)
        read, waited, words = torch.ones_like(live), torch.ones_like(live), torch.zeros_like(live)
        while len(live):
            table = torch.stack(
                [torch.zeros_like(live), first[live] + length[live] - 1, ends[live, read]]
            )
            logits = cache.append(
                pending[:, None], table[..., None], self.offset, attention=head.needs_attention
            )
            logits = logits[:, : len(starts)]  # past them are padding rows of the head
            chosen, chosen_logprobs = sample(logits, uniforms[live, length[live]], sampling)
            begins = starts[chosen] | (length[live] == 0)
            finished = read == units[live]
            asked = begins if sampling.whole_words else torch.ones_like(begins)
            # an unfinished word is not written
            state = State(logits, read, words - (~begins).long(), finished, asked)
            if head.needs_attention:
                state.attention = _by_unit(cache.attention, cache.keys, ends[live])
            write = head.writes(state)
            if head.adaptive:
                lag = read - state.written
                write |= lag >= (BEYOND if sampling.max_lag is None else sampling.max_lag)
                write |= waited >= (BEYOND if sampling.max_reads is None else sampling.max_reads)
                write &= lag >= sampling.min_lag
            write |= finished | ~asked
            place = live[write]
            tokens[place, length[place]] = chosen[write]
            logprobs[place, length[place]] = chosen_logprobs[write]
            reads[place, length[place]] = read[write]
            length[place] += 1
            stopped[place] = torch.isin(chosen[write], stops)
            words += write & begins
            pending = torch.where(write, chosen, pending)
            cache.keys[0, ~write, -1] = PADDING  # that row is run again, seeing more
            read, waited = read + ~write, torch.where(write, 0, waited + 1)
            keep = (~stopped[live] & (length[live] < sampling.max_new_tokens)).nonzero().flatten()
            if 0 < len(keep) < len(live):  # finished rows leave the batch
                cache.select(keep)
            live, pending, read, waited, words = (
                x[keep] for x in (live, pending, read, waited, words)
            )
        tokens, reads, logprobs, length = (
            x.cpu().numpy() for x in (tokens, reads, logprobs, length)
        )
        return [
            self._written(
                r, *(x[i, : length[i]] for x in (tokens, reads, logprobs)), bool(stopped[i])
            )
            for i, r in enumerate(requests)
        ]

    def _encode(self, requests: Sequence[Request]) -> Cache:
        """The source and all of the opening but its last token."""
        known = [[t for part in r.opening for t in part][:-1] for r in requests]
        rows = []
        for request, opening in zip(requests, known):
            layout = from_visible(
                len(request.prompt_ids), [len(request.segments[0])] * len(opening), self.offset
            )
            rows.append(
                (torch.tensor([*request.prompt_ids, *opening]), torch.from_numpy(layout.table()))
            )
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        table = torch.zeros(3, len(rows), width, dtype=torch.long)
        table[0] = PADDING
        for row, (own, columns) in enumerate(rows):
            ids[row, : len(own)], table[:, row, : len(own)] = own, columns
        cache, ids = Cache(self.model, len(rows)), ids.to(self.device)
        frames = [r.frames for r in requests if r.frames is not None]
        embeddings = embed(self.model, self.encoder, ids, frames) if frames else None
        cache.append(ids, table.to(self.device), self.offset, embeddings=embeddings)
        return cache

    def _written(
        self,
        request: Request,
        tokens: np.ndarray,
        reads: np.ndarray,
        logprobs: np.ndarray,
        stopped: bool,
    ) -> Trajectory:
        opening = [t for part in request.opening for t in part]
        ends = np.cumsum([len(s) for s in request.segments])
        reads = np.append(np.zeros(len(opening), dtype=np.int64), reads)
        return Trajectory(
            request.prompt_index,
            request.sample_index,
            list(request.prompt_ids),
            [*opening, *tokens.tolist()],
            "stop" if stopped else "length",
            np.append(np.zeros(len(opening), np.float32), logprobs.astype(np.float32)),
            layout=from_visible(ends[-1], ends[reads], self.offset),
            reads=reads,
            sampled=np.arange(len(reads)) >= len(opening),
            frames=request.frames,
        )


def _by_unit(attention: torch.Tensor, keys: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[layers, B, heads, M]: the attention [layers, B, heads, K] that falls on the tokens of each
    source unit."""
    unit = torch.searchsorted(ends, keys[1], right=True)  # 0: the frame
    unit = torch.where(keys[0] == SOURCE, unit, 0)
    weights = torch.zeros(
        *attention.shape[:-1], ends.shape[1], device=attention.device, dtype=attention.dtype
    )
    weights.scatter_add_(-1, unit[None, :, None].expand_as(attention), attention)
    return weights[..., 1:]
