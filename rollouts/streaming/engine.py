"""Streaming generation: a model reads segments of a source and writes thoughts in between
(rollouts/layout.py).

A key in a KV cache carries its rotated position, so the order in the cache does not matter: one
cache in order of arrival, explicit positions, and a mask that hides target keys from source queries
give exactly the logits of the full masked forward (methods.md, 3). `Cache` is that; both ways of
generating are made of it. `Live` reads a segment when it comes. `StreamingEngine` draws a batch of
rollouts: as the source never sees the target, it is encoded at once, and to read on is to let a row
see more of it. The query at a closing token predicts the next thought, so it already sees the next
segment: both read before they feed it."""

from __future__ import annotations

from typing import Iterator, Sequence

import numpy as np
import torch

from rollouts.engines.huggingface import HuggingFaceEngine, sample
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
from rollouts.trajectory import Request, Sampling, Trajectory


class Cache:
    """The keys and values of B rows in order of arrival, with the group and index of each key."""

    def __init__(self, model, rows: int):
        from transformers import DynamicCache

        self.model, self.cached = model, DynamicCache(config=model.config)
        self.keys = torch.empty(2, rows, 0, dtype=torch.long, device=model.device)

    def append(
        self,
        ids: torch.Tensor,
        table: torch.Tensor,
        offset: int | torch.Tensor = 0,
        attention: bool = False,
        embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run n tokens per row and keep their keys.

        Args:
            ids: [B, n].
            table: [3, B, n], group, index and limit, as `sees` reads them.
            offset: position of target index 0.
            embeddings: [B, n, H], in place of those of the ids.
            attention: keep that of the last token in `attention` [layers, B, heads, keys]; the
                model's must be eager.

        Returns:
            the logits [B, V] after the last of them, float32.
        """
        self.keys = torch.cat([self.keys, table[:2]], -1)
        mask = sees(table[..., :, None], self.keys[..., None, :])[:, None]
        positions = table[1] + (table[0] >= 0) * offset
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
            self.attention = torch.stack([layer[:, :, -1] for layer in output.attentions]).float()
        return output.logits[:, -1].float()

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; one may be named several times."""
        self.cached.batch_select_indices(rows)
        self.keys = self.keys[:, rows]


class StreamingEngine(HuggingFaceEngine):
    """Batched streaming rollouts with `streaming.layout` grouped or batch."""

    def __init__(self, path: str, config, device: torch.device, dtype: torch.dtype, **rest):
        super().__init__(path, config, device, dtype, **rest)
        self.layout, self.offset = config.streaming.layout, config.streaming.target_offset
        check_layouts(self.model, lambda ids, layout: masked_states(self.model, ids, layout))

    def live(self, sampling: Sampling, seed: int = 0) -> Live:
        """A text to be read and thought about while it arrives."""
        return Live(self.model, sampling, seed, self.offset)

    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        cache, logits, limits = self._read(requests)
        count, device = len(requests), self.device
        thoughts = torch.tensor([r.thoughts for r in requests], device=device)
        # index of the next token
        written = torch.tensor([sum(map(len, r.opening)) for r in requests], device=device)
        totals = [
            r.thoughts * sampling.max_thought_tokens + sampling.max_new_tokens for r in requests
        ]
        uniforms = torch.zeros(count, max(totals), dtype=torch.float64)
        for row, (request, total) in enumerate(zip(requests, totals)):
            generator = torch.Generator().manual_seed(request.seed)
            uniforms[row, :total] = torch.rand(total, generator=generator, dtype=torch.float64)
        uniforms = uniforms.to(device)
        stops, closes = (
            torch.tensor(ids, dtype=torch.long, device=device)
            for ids in (sampling.stop_ids, sampling.thought_stops)
        )
        tokens = torch.zeros(count, max(totals), dtype=torch.long, device=device)
        logprobs = torch.zeros(count, max(totals), device=device)
        slots = torch.full_like(tokens, -1)
        cut = torch.zeros_like(tokens, dtype=torch.bool)  # closed at the limit of a thought
        stopped = torch.zeros(count, dtype=torch.bool, device=device)
        live = torch.arange(count, device=device)  # rows of `requests` still writing
        # the slot they are in, tokens in it
        slot, used = torch.zeros_like(live), torch.zeros_like(live)
        for step in range(max(totals)):
            chosen, chosen_logprobs = sample(logits, uniforms[live, step], sampling)
            thinking = slot < thoughts[live]
            full = thinking & (used == sampling.max_thought_tokens - 1)
            if sampling.close_id is not None:
                chosen = chosen.masked_fill(full, sampling.close_id)
            tokens[live, step], slots[live, step], cut[live, step] = chosen, slot, full
            logprobs[live, step] = chosen_logprobs.masked_fill(full, 0)
            closed = full | (thinking & torch.isin(chosen, closes))
            ended = ~thinking & torch.isin(chosen, stops)
            stopped[live] = ended
            slot, used = slot + closed, (used + 1).masked_fill(closed, 0)
            keep = (~ended & (thinking | (used < sampling.max_new_tokens))).nonzero().flatten()
            if not len(keep):
                break
            if len(keep) < len(live):  # finished rows leave the batch
                cache.select(keep)
                live, chosen, slot, used = live[keep], chosen[keep], slot[keep], used[keep]
            table = torch.stack([torch.zeros_like(live), written[live] + step, limits[live, slot]])
            logits = cache.append(chosen[:, None], table[..., None], self.offset)
        tokens, slots, cut, logprobs = (x.cpu().numpy() for x in (tokens, slots, cut, logprobs))
        return [
            self._trajectory(r, *(x[i] for x in (tokens, slots, cut, logprobs)), bool(stopped[i]))
            for i, r in enumerate(requests)
        ]

    def _read(self, requests: Sequence[Request]) -> tuple[Cache, torch.Tensor, torch.Tensor]:
        """Encode source and opening, once for requests that share them.

        Returns:
            the cache, a row per request; the logits [B, V] of their first token; and [B, N + 1] the
            source tokens that each thought and the deep segment see.
        """
        unique = {
            key: row
            for row, key in enumerate(dict.fromkeys((r.segments, r.opening) for r in requests))
        }
        rows, limits = [], []
        for segments, opening in unique:
            lengths, first = [len(s) for s in segments], len(opening)
            counts = read_counts(self.layout, lengths, first + 1 + max(len(segments) - first, 0))
            # The row that predicts the first thought sees what that thought does: hence one token
            # more, which is cut.
            layout = from_visible(
                sum(lengths), np.repeat(counts[: first + 1], [*map(len, opening), 1])
            )
            ids = [i for part in (*segments, *opening) for i in part]
            rows.append((torch.tensor(ids), torch.from_numpy(layout.table()[:, :-1])))
            limits.append(torch.from_numpy(counts[first:]))
        width = max(len(ids) for ids, _ in rows)
        ids, table = (
            torch.zeros(len(rows), width, dtype=torch.long),
            torch.zeros(3, len(rows), width, dtype=torch.long),
        )
        table[0] = PADDING
        # left padding: the last column predicts every row's first token
        for row, (own, columns) in enumerate(rows):
            ids[row, width - len(own) :], table[:, row, width - len(own) :] = own, columns
        limits = torch.nn.utils.rnn.pad_sequence(limits, batch_first=True)
        place = torch.tensor([unique[r.segments, r.opening] for r in requests], device=self.device)
        cache = Cache(self.model, len(rows))
        logits = cache.append(ids.to(self.device), table.to(self.device), self.offset)[place]
        cache.select(place)
        return cache, logits, limits.to(self.device)[place]

    def _trajectory(
        self, request: Request, tokens, slots, cut, logprobs, stopped: bool
    ) -> Trajectory:
        """Assemble one row's arrays [total], of which those with a slot were written."""
        length = int((slots >= 0).sum())
        ends = np.cumsum(np.bincount(slots[:length], minlength=request.thoughts + 1))
        written = [part.tolist() for part in np.split(tokens[:length], ends[:-1])]
        fields = arrange(
            self.layout,
            request.segments,
            request.opening,
            written,
            cut[ends - 1].tolist(),
            self.offset,
        )
        own = np.zeros(len(fields["completion_ids"]), dtype=np.float32)
        own[fields["slots"] >= 0] = logprobs[:length]
        return Trajectory(
            request.prompt_index,
            request.sample_index,
            logprobs=own,
            finish_reason="stop" if stopped else "length",
            **fields,
        )


class Live:
    """One row, read and written step by step: `feed` a source segment, `force` or `write` a target
    one, and so on.

    With the same seed it writes what `StreamingEngine.generate` does, up to rounding.
    """

    def __init__(self, model, sampling: Sampling, seed: int = 0, offset: int = 0):
        self.cache, self.sampling, self.offset = Cache(model, 1), sampling, offset
        self.generator = torch.Generator().manual_seed(seed)
        self.read = self.wrote = 0  # tokens of the source, and of the target, whose keys are cached
        # the last target token: fed once the next segment is there, which its row sees
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
        """Write a thought, or the deep segment, token by token. There must be an opening, and
        something read.

        Yields:
            token id, its log-prob (nats, 0 where forced), and whether it was sampled.
        """
        options = self.sampling
        limit, stops = (
            (options.max_new_tokens, options.stop_ids)
            if deep
            else (options.max_thought_tokens, options.thought_stops)
        )
        for used in range(limit):
            logits = self._run(self.pending, 0, self.wrote, self.read)
            self.wrote += 1
            uniform = torch.rand(1, generator=self.generator, dtype=torch.float64).to(logits.device)
            token, logprob = (x.item() for x in sample(logits, uniform, options))
            forced = not deep and used == limit - 1
            if forced:
                token, logprob = options.close_id, 0.0
            self.pending = [token]
            yield token, logprob, not forced
            if token in stops:
                return

    @torch.no_grad()
    def _run(self, ids: Sequence[int], group: int, start: int, limit: int) -> torch.Tensor:
        device = self.cache.model.device
        row = torch.tensor([list(ids)], dtype=torch.long, device=device)
        index = torch.arange(start, start + len(ids), device=device)[None]
        table = torch.stack([torch.full_like(index, group), index, torch.full_like(index, limit)])
        return self.cache.append(row, table, self.offset)


def masked_states(model, ids: Sequence[int], layout: Layout) -> torch.Tensor:
    """Hidden states [L, H] of one full forward under a layout's mask, without a cache."""
    row, positions = (
        torch.tensor([list(x)], device=model.device) for x in (ids, layout.positions().tolist())
    )
    mask = additive(torch.from_numpy(layout.mask()).to(model.device), model.dtype)
    return model.base_model(
        input_ids=row, attention_mask=mask[None, None], position_ids=positions, use_cache=False
    ).last_hidden_state[0]
