"""Streaming generation: a model reads segments of a source and writes thoughts in between.

rollouts/layout.py defines what each token sees. A key in a KV cache carries its rotated position,
so the order in the cache does not matter. One cache in order of arrival, explicit positions, and a
mask that hides target keys from source queries give exactly the logits of the full masked forward
(docs/specification.md, 3.3). `Cache` is that cache, and both ways of generating use it:

- `Live` reads a segment when it comes.
- `StreamingEngine` draws a batch of rollouts. The source never sees the target, so it is encoded at
  once. To read on is to let a row see more of it.

The query at a closing token predicts the next thought, so it already sees the next segment. Both
ways read that segment before they feed the closing token.

Letters: B requests, R rows that are still live, N thoughts, T tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rollouts.engines.decoding import Decoding, RowState
from rollouts.engines.huggingface import HuggingFaceEngine
from rollouts.engines.sampling import sample
from rollouts.layout import (
    PADDING,
    SOURCE,
    Layout,
    additive,
    arrange,
    check_layouts,
    from_visible,
    read_counts,
    sees,
)
from rollouts.streaming.tokens import StreamingSampling
from rollouts.trajectory import Request, Trajectory


class Cache:
    """The keys and values of B rows in order of arrival, with the group and index of each key."""

    def __init__(self, model, rows: int):
        from transformers import DynamicCache

        self.model, self.cached = model, DynamicCache(config=model.config)
        self.keys = torch.empty(2, rows, 0, dtype=torch.long, device=model.device)

    def append(
        self,
        ids: Tensor,
        table: Tensor,
        offset: int | Tensor = 0,
        attention: bool = False,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Run n tokens per row and keep their keys.

        Args:
            ids: [B, n].
            table: [3, B, n], group, index and limit, as `sees` reads them.
            offset: position of target index 0.
            attention: keep the attention of the last token in `self.attention`, which is
                [layers, B, heads, keys]. The model's attention must be eager.
            embeddings: [B, n, H], in place of those of the ids.

        Returns:
            the logits [B, V] after the last of them, float32.
        """
        self.keys = torch.cat([self.keys, table[:2]], -1)
        # [B, n, keys], and one mask for all heads.
        mask = sees(table[..., :, None], self.keys[..., None, :])
        mask = mask[:, None]
        group, index, _ = table
        positions = index + (group >= 0) * offset
        inputs = {"input_ids": ids} if embeddings is None else {"inputs_embeds": embeddings}
        output = self.model(
            **inputs,
            attention_mask=additive(mask, self.model.dtype),
            position_ids=positions,
            past_key_values=self.cached,
            use_cache=True,
            logits_to_keep=1,
            output_attentions=attention,
        )
        if attention:
            last = [layer[:, :, -1] for layer in output.attentions]
            self.attention = torch.stack(last).float()
        return output.logits[:, -1].float()

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; one may be named several times."""
        self.cached.batch_select_indices(rows)
        self.keys = self.keys[:, rows]


@dataclass
class SlotState(RowState):
    """Where R live rows are. Slots 0 .. N - 1 are the thoughts, slot N is the deep segment."""

    thoughts: Tensor  # [R] N, the thoughts of the row
    start: Tensor  # [R] index of the first written target token, after the opening
    limits: Tensor  # [R, N + 1] source tokens that each slot sees
    slot: Tensor  # [R] the slot that the row is in
    used: Tensor  # [R] tokens in that slot

    @property
    def thinking(self) -> Tensor:
        """[R] bool: the row is in a thought."""
        return self.slot < self.thoughts

    @property
    def visible(self) -> Tensor:
        """[R] source tokens that the slot of each row sees."""
        return self.limits.gather(-1, self.slot[:, None])[:, 0]

    def advance(self, closed: Tensor) -> None:
        """Count the token that each row has written; `closed` [R] bool: it ended its thought."""
        self.slot = self.slot + closed
        self.used = (self.used + 1).masked_fill(closed, 0)


class StreamingEngine(HuggingFaceEngine):
    """Batched streaming rollouts with `streaming.layout` grouped or batch."""

    def __init__(self, path: str, config, device: torch.device, dtype: torch.dtype, **rest):
        super().__init__(path, config, device, dtype, **rest)
        self.layout = config.streaming.layout
        self.offset = config.streaming.target_offset
        check_layouts(self.model, lambda ids, layout: masked_states(self.model, ids, layout))

    def live(self, sampling: StreamingSampling, seed: int = 0) -> Live:
        """A text to be read and thought about while it arrives."""
        return Live(self.model, sampling, seed, self.offset)

    def _batch(self, requests: Sequence[Request], sampling: StreamingSampling) -> list[Trajectory]:
        cache, logits, rows = self._read(requests)
        limits = [
            request.thoughts * sampling.max_thought_tokens + sampling.max_new_tokens
            for request in requests
        ]
        decoding = Decoding(
            requests,
            sampling,
            limits,
            self.device,
            slots=torch.long,
            forced=torch.bool,
        )
        closing_ids = torch.tensor(sampling.thought_stops, dtype=torch.long, device=self.device)
        while len(decoding.live):
            tokens, logprobs = decoding.propose(logits)
            thinking = rows.thinking
            # The last token that a thought may have is forced: it closes the thought.
            forced = thinking & (rows.used == sampling.max_thought_tokens - 1)
            if sampling.close_id is not None:
                tokens = tokens.masked_fill(forced, sampling.close_id)
            logprobs = logprobs.masked_fill(forced, 0)
            decoding.write(tokens=tokens, logprobs=logprobs, slots=rows.slot, forced=forced)
            rows.advance(forced | (thinking & torch.isin(tokens, closing_ids)))
            stopped = ~thinking & decoding.on_stop(tokens)
            full = ~thinking & (rows.used >= sampling.max_new_tokens)
            decoding.leave(stopped, full, cache, rows)
            if len(decoding.live):
                logits = self._feed(cache, decoding, rows)
        return [self._trajectory(*completion) for completion in decoding.completions()]

    def _feed(self, cache: Cache, decoding: Decoding, rows: SlotState) -> Tensor:
        """Run the newest token of each live row; returns the logits [R, V] of the next ones."""
        ids = decoding.newest
        index = rows.start + decoding.written - 1
        table = torch.stack([torch.zeros_like(ids), index, rows.visible])
        return cache.append(ids[:, None], table[..., None], self.offset)

    def _read(self, requests: Sequence[Request]) -> tuple[Cache, Tensor, SlotState]:
        """Encode source and opening, once for requests that share them.

        Returns:
            the cache, a row per request; the logits [B, V] of their first token; and their state.
        """
        keys = [(request.segments, request.opening) for request in requests]
        prompts = dict(zip(keys, requests))
        ids, table = padded([self._prompt(request) for request in prompts.values()], "left")
        ids, table = ids.to(self.device), table.to(self.device)
        cache = Cache(self.model, len(prompts))
        logits = cache.append(ids, table, self.offset)
        # From a row per prompt to a row per request.
        row_of = {key: row for row, key in enumerate(prompts)}
        place = torch.tensor([row_of[key] for key in keys], device=self.device)
        cache.select(place)
        return cache, logits[place], self._start(requests)

    def _start(self, requests: Sequence[Request]) -> SlotState:
        """The state of a row per request: it is in its first slot, and nothing is written."""
        counts = [self._counts(request)[len(request.opening) :] for request in requests]
        limits = pad_sequence([torch.from_numpy(count) for count in counts], batch_first=True)
        thoughts = torch.tensor([request.thoughts for request in requests])
        start = torch.tensor([len(joined(request.opening)) for request in requests])
        return SlotState(
            thoughts=thoughts.to(self.device),
            start=start.to(self.device),
            limits=limits.to(self.device),
            slot=torch.zeros_like(thoughts, device=self.device),
            used=torch.zeros_like(thoughts, device=self.device),
        )

    def _counts(self, request: Request) -> np.ndarray:
        """Source tokens that each target segment sees: opening, thoughts, deep segment."""
        lengths = [len(segment) for segment in request.segments]
        targets = len(request.opening) + request.thoughts + 1
        return read_counts(self.layout, lengths, targets)

    def _prompt(self, request: Request) -> tuple[Tensor, Tensor]:
        """Ids [n] and table [3, n] of [source | opening]."""
        source = joined(request.segments)
        lengths = [len(segment) for segment in request.opening]
        # The row that predicts the first thought sees what that thought does. Hence one target
        # token more, which is cut off again.
        lengths.append(1)
        counts = self._counts(request)[: len(lengths)]
        layout = from_visible(len(source), np.repeat(counts, lengths))
        table = layout.table()[:, :-1]
        ids = [*source, *joined(request.opening)]
        return torch.tensor(ids), torch.from_numpy(table)

    def _trajectory(
        self, request: Request, written: dict[str, np.ndarray], finish_reason: str
    ) -> Trajectory:
        """Assemble one completion from the tables [T] of what was written."""
        lengths = np.bincount(written["slots"], minlength=request.thoughts + 1)
        ends = np.cumsum(lengths)
        targets = np.split(written["tokens"], ends[:-1])
        fields = arrange(
            self.layout,
            request.segments,
            request.opening,
            [target.tolist() for target in targets],
            written["forced"][ends - 1].tolist(),
            self.offset,
        )
        logprobs = np.zeros(len(fields["slots"]), dtype=np.float32)
        logprobs[fields["slots"] >= 0] = written["logprobs"]
        return Trajectory(
            request.prompt_index,
            request.sample_index,
            logprobs=logprobs,
            finish_reason=finish_reason,
            **fields,
        )


def joined(parts: Sequence[Sequence[int]]) -> list[int]:
    """The ids of all parts, in order."""
    return [token for part in parts for token in part]


def padded(rows: Sequence[tuple[Tensor, Tensor]], side: str) -> tuple[Tensor, Tensor]:
    """A batch of rows of unequal length, with padding on their "left" or "right" side.

    Args:
        rows: ids [n] and table [3, n] of each.
        side: of the padding. On the left, the last column predicts the next token of every row.

    Returns:
        ids [B, n] and table [3, B, n], which knows the padding by its group.
    """

    def pad(parts: list[Tensor], value: int = 0) -> Tensor:
        return pad_sequence(parts, batch_first=True, padding_value=value, padding_side=side)

    ids = pad([ids for ids, _ in rows])
    group = pad([table[0] for _, table in rows], PADDING)
    index = pad([table[1] for _, table in rows])
    limit = pad([table[2] for _, table in rows])
    return ids, torch.stack([group, index, limit])


class Live:
    """One row, read and written step by step.

    `feed` reads a source segment. `force` and `write` add a target segment. With the same seed
    `write` gives what `StreamingEngine.generate` does, up to rounding.
    """

    def __init__(self, model, sampling: StreamingSampling, seed: int = 0, offset: int = 0):
        self.cache = Cache(model, 1)
        self.sampling, self.offset = sampling, offset
        self.generator = torch.Generator().manual_seed(seed)
        # Tokens of the source, and of the target, whose keys are cached.
        self.read = self.wrote = 0
        # The last target token waits here until the next segment is there, which its row sees.
        self.pending: list[int] = []

    def feed(self, ids: Sequence[int]) -> None:
        """Read a source segment."""
        self._run(ids, SOURCE, self.read, 0)
        self.read += len(ids)

    def force(self, ids: Sequence[int]) -> None:
        """Write a given target segment."""
        if known := [*self.pending, *ids[:-1]]:
            self._run(known, 0, self.wrote, self.read)
            self.wrote += len(known)
        self.pending = list(ids[-1:])

    def write(self, deep: bool = False) -> Iterator[tuple[int, float, bool]]:
        """Write a thought, or the deep segment, token by token.

        Something must have been read, and an opening forced.

        Yields:
            token id, its log-prob (nats, 0 where forced), and whether it was sampled.
        """
        options = self.sampling
        limit, stops = options.max_thought_tokens, options.thought_stops
        if deep:
            limit, stops = options.max_new_tokens, options.stop_ids
        for used in range(limit):
            token, logprob = self._propose()
            forced = not deep and used == limit - 1
            if forced:
                token, logprob = options.close_id, 0.0
            self.pending = [token]
            yield token, logprob, not forced
            if token in stops:
                return

    def _propose(self) -> tuple[int, float]:
        """Run the pending token and draw the next one."""
        logits = self._run(self.pending, 0, self.wrote, self.read)
        self.wrote += 1
        uniform = torch.rand(1, generator=self.generator, dtype=torch.float64)
        token, logprob = sample(logits, uniform.to(logits.device), self.sampling)
        return int(token), float(logprob)

    @torch.no_grad()
    def _run(self, ids: Sequence[int], group: int, start: int, limit: int) -> Tensor:
        """Run tokens of one group from index `start`; returns the logits [1, V] after the last."""
        device = self.cache.model.device
        row = torch.tensor([list(ids)], dtype=torch.long, device=device)
        table = torch.zeros(3, *row.shape, dtype=torch.long, device=device)
        table[0] = group
        table[1] = torch.arange(start, start + len(ids), device=device)
        table[2] = limit
        return self.cache.append(row, table, self.offset)


def masked_states(model, ids: Sequence[int], layout: Layout) -> Tensor:
    """Hidden states [L, H] of one full forward under a layout's mask, without a cache."""
    positions = torch.from_numpy(layout.positions()).to(model.device)
    mask = torch.from_numpy(layout.mask()).to(model.device)
    output = model.base_model(
        input_ids=torch.tensor([list(ids)], device=model.device),
        attention_mask=additive(mask, model.dtype)[None, None],
        position_ids=positions[None],
        use_cache=False,
    )
    return output.last_hidden_state[0]
