"""Simultaneous generation: read a unit or write a token, as a decision head says.

This is ProactiveLLM's generation (arXiv 2606.00523; docs/specification.md, 5.3). A row proposes its
next token from what it has read. If the head says so, the token is written. If not, the proposal is
dropped and one unit more is read.

The source does not see the target, so it is encoded at once. To read on is to run the last target
token again with more of the source in view. The keys of its earlier run are hidden from then on. So
the key of each target token is that of the view which its successor was written with, as in
training (rollouts/layout.py, `from_visible`). The log-probs are those of one masked forward.

Letters: B requests, R rows that are still live, M units of a source, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rollouts.engines.decoding import Decoding, RowState
from rollouts.layout import PADDING, SOURCE, from_visible
from rollouts.simultaneous.decision import SimultaneousSampling, State, decide
from rollouts.simultaneous.frames import embed, load_encoder
from rollouts.streaming.engine import Cache, StreamingEngine, joined, padded
from rollouts.trajectory import Request, Trajectory

BEYOND = 2**40  # more tokens than any source has


@dataclass
class ReadingState(RowState):
    """What R live rows have read and written."""

    units: Tensor  # [R] M, the units of the source
    ends: Tensor  # [R, 1 + M] source tokens in view once so many units are read
    start: Tensor  # [R] index of the first written target token, after the opening
    pending: Tensor  # [R] the last target token, which is run once more after every read
    read: Tensor  # [R] units read
    waited: Tensor  # [R] units read since the last token was written
    words: Tensor  # [R] words begun

    @property
    def visible(self) -> Tensor:
        """[R] source tokens that each row sees."""
        return self.ends.gather(-1, self.read[:, None])[:, 0]

    def proposal(self, logits: Tensor, begins: Tensor, whole_words: bool) -> State:
        """What a decision head knows of each row and its proposal.

        Args:
            logits: [R, V] of the proposal.
            begins: [R] bool, the proposal begins a word.
            whole_words: the head decides only where a word begins.
        """
        return State(
            logits=logits,
            read=self.read,
            # A word that goes on is not written in full.
            written=self.words - (~begins).long(),
            finished=self.read == self.units,
            asked=begins if whole_words else torch.ones_like(begins),
        )

    def advance(self, write: Tensor, tokens: Tensor, begun: Tensor) -> None:
        """Count a step, in which each row writes its token or reads one unit more.

        Args:
            write: [R] bool, the others read.
            tokens: [R] the proposals.
            begun: [R] how many words the proposal begins.
        """
        self.words = self.words + write * begun
        self.pending = torch.where(write, tokens, self.pending)
        self.read = self.read + ~write
        self.waited = torch.where(write, 0, self.waited + 1)


class SimultaneousEngine(StreamingEngine):
    """Batched reading and writing.

    Requests have segments [frame, unit 1, …, unit M] and an opening. The sampling has a `head` and
    `word_starts`. Trajectories get `reads`.
    """

    def __init__(self, path: str, config, device: torch.device, dtype: torch.dtype, **rest):
        super().__init__(path, config, device, dtype, **rest)
        self.attention = self.model.config._attn_implementation
        self.encoder = None
        if config.model.encoder:
            self.encoder = load_encoder(config.model.encoder, device)

    def _batch(
        self, requests: Sequence[Request], sampling: SimultaneousSampling
    ) -> list[Trajectory]:
        needs_attention = sampling.head.needs_attention
        self.model.set_attn_implementation("eager" if needs_attention else self.attention)
        cache, rows = self._encode(requests), self._start(requests)
        limits = [sampling.max_new_tokens] * len(requests)
        decoding = Decoding(requests, sampling, limits, self.device, reads=torch.long)
        starts_V = torch.from_numpy(sampling.word_starts).long().to(self.device)
        while len(decoding.live):
            logits = self._run_pending(cache, decoding, rows, needs_attention)
            # Rows of the head past the tokenizer's tokens are padding.
            logits = logits[:, : len(starts_V)]
            tokens, logprobs = decoding.propose(logits)
            # The first token begins a word, whatever it is.
            begun = starts_V[tokens].clamp(min=(decoding.written == 0).long())
            state = rows.proposal(logits, begun > 0, sampling.whole_words)
            if needs_attention:
                state.attention = attention_by_unit(cache.attention, cache.keys, rows.ends)
            write = decide(sampling, state, rows.waited)
            decoding.write(write, tokens=tokens, logprobs=logprobs, reads=rows.read)
            # A row that reads runs its last token again, seeing more: the key of now is hidden.
            cache.keys[0, ~write, -1] = PADDING
            rows.advance(write, tokens, begun)
            decoding.leave(write & decoding.on_stop(tokens), decoding.full, cache, rows)
        return [self._trajectory(*completion) for completion in decoding.completions()]

    def _run_pending(
        self, cache: Cache, decoding: Decoding, rows: ReadingState, attention: bool
    ) -> Tensor:
        """Run the pending token of each row; returns the logits [R, V] of the next ones."""
        index = rows.start + decoding.written - 1
        table = torch.stack([torch.zeros_like(index), index, rows.visible])
        return cache.append(
            rows.pending[:, None], table[..., None], self.offset, attention=attention
        )

    def _start(self, requests: Sequence[Request]) -> ReadingState:
        """The state of a row per request: the frame and one unit are read, nothing is written."""
        units, ends, start, pending = [], [], [], []
        for request in requests:
            lengths = torch.tensor([len(segment) for segment in request.segments])
            opening = joined(request.opening)
            units.append(len(request.segments) - 1)
            ends.append(lengths.cumsum(0))
            start.append(len(opening))
            pending.append(opening[-1])
        units = torch.tensor(units, device=self.device)
        ends = pad_sequence(ends, batch_first=True, padding_value=BEYOND)
        return ReadingState(
            units=units,
            ends=ends.to(self.device),
            start=torch.tensor(start, device=self.device),
            pending=torch.tensor(pending, device=self.device),
            read=torch.ones_like(units),
            waited=torch.ones_like(units),
            words=torch.zeros_like(units),
        )

    def _encode(self, requests: Sequence[Request]) -> Cache:
        """Read the whole source, and all of the opening but its last token."""
        ids, table = padded([self._prompt(request) for request in requests], "right")
        ids, table = ids.to(self.device), table.to(self.device)
        frames = [request.frames for request in requests if request.frames is not None]
        embeddings = embed(self.model, self.encoder, ids, frames) if frames else None
        cache = Cache(self.model, len(requests))
        cache.append(ids, table, self.offset, embeddings=embeddings)
        return cache

    def _prompt(self, request: Request) -> tuple[Tensor, Tensor]:
        """Ids [n] and table [3, n] of [source | opening but its last token]."""
        opening = joined(request.opening)[:-1]
        # The opening is written before any unit is read.
        visible = [len(request.segments[0])] * len(opening)
        layout = from_visible(len(request.prompt_ids), visible, self.offset)
        ids = [*request.prompt_ids, *opening]
        return torch.tensor(ids), torch.from_numpy(layout.table())

    def _trajectory(
        self, request: Request, written: dict[str, np.ndarray], finish_reason: str
    ) -> Trajectory:
        """Assemble one completion from the tables [T] of what was written."""
        opening = joined(request.opening)
        zeros = np.zeros(len(opening))
        # No unit is read when the opening is written, and its tokens have no log-probs.
        reads = np.append(zeros.astype(np.int64), written["reads"])
        logprobs = np.append(zeros.astype(np.float32), written["logprobs"])
        ends = np.cumsum([len(segment) for segment in request.segments])
        return Trajectory(
            request.prompt_index,
            request.sample_index,
            list(request.prompt_ids),
            [*opening, *written["tokens"].tolist()],
            finish_reason,
            logprobs,
            layout=from_visible(ends[-1], ends[reads], self.offset),
            reads=reads,
            sampled=np.arange(len(reads)) >= len(opening),
            frames=request.frames,
        )


def attention_by_unit(attention: Tensor, keys: Tensor, ends: Tensor) -> Tensor:
    """The attention that falls on the tokens of each source unit.

    Args:
        attention: [layers, B, heads, K], of one row on K keys.
        keys: [2, B, K], group and index of each key.
        ends: [B, 1 + M] source tokens in the frame and the first units.

    Returns:
        [layers, B, heads, M].
    """
    # The frame is unit 0. Target tokens are counted with it, and it is cut off.
    unit = torch.searchsorted(ends, keys[1], right=True)
    unit = torch.where(keys[0] == SOURCE, unit, 0)
    unit = unit[None, :, None].expand_as(attention)
    weights = attention.new_zeros(*attention.shape[:-1], ends.shape[1])
    weights.scatter_add_(-1, unit, attention)
    return weights[..., 1:]
