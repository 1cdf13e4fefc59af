"""The streaming layouts: where each token of [source | target] stands, and what it sees.

`grouped` (StreamingThinker, arXiv 2510.17238, and group position encoding, arXiv 2505.16983;
methods.md, 3): source and target have positions of their own; the source is causal and never sees
the target; a target token sees the target before it, and the source segments that were read when it
was written. `batch` is the same with the whole source read first. `interleaved` is the order of
arrival, natural positions and a causal mask: it needs no `Layout`.

S source tokens, T target tokens, L = S + T. Masks are built by broadcasting one rule, `sees`;
nothing loops over pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Callable, Sequence

import numpy as np
import torch

from recipes.errors import ModelError

SOURCE, PADDING = -1, -2  # groups; a target token's group is its view, 0 or more


def sees(query, key):
    """Whether a query attends to a key: the rule of every mask, dense, cached or blockwise.

    Args:
        query: (group, index, limit), arrays or tensors that broadcast with those of the keys: the
            group; the place among the tokens of that group; how many source tokens it sees, besides
            its own group's up to itself (0 for a source token). Padding sees padding only.
        key: (group, index).
    """
    (group, index, limit), (key_group, key_index) = query, key
    return ((key_group == group) & (key_index <= index)) | (
        (key_group == SOURCE) & (key_index < limit)
    )


@dataclass(frozen=True)
class Layout:
    """[source | target]: the source causal and blind to the target; a target row sees a prefix of
    the source.

    Without a target it is a plain causal sequence of S tokens.
    """

    source: int  # S
    # [T] source tokens that each target row sees, after the shift by one: row t predicts token t +
    # 1
    visible: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    offset: int = 0  # position of the first target token
    # [T], in blocks: targets of different views do not see one another, and the positions of each
    # start at `offset`
    views: np.ndarray | None = None

    @property
    def length(self) -> int:
        return self.source + len(self.visible)

    def table(self) -> np.ndarray:
        """[3, L] int64: group, index and limit of each token, as `sees` reads them."""
        count = len(self.visible)
        views = (
            np.zeros(count, dtype=np.int64)
            if self.views is None
            else np.asarray(self.views, dtype=np.int64)
        )
        place = np.arange(count)
        starts = np.append(True, views[1:] != views[:-1])[:count]
        table = np.zeros((3, self.length), dtype=np.int64)
        table[0, : self.source], table[0, self.source :] = SOURCE, views
        table[1, : self.source] = np.arange(self.source)
        table[1, self.source :] = place - np.maximum.accumulate(np.where(starts, place, 0))
        table[2, self.source :] = self.visible
        return table

    def positions(self) -> np.ndarray:
        """[L] int64."""
        group, index, _ = self.table()
        return index + np.where(group == SOURCE, 0, self.offset)

    def mask(self) -> np.ndarray:
        """[L, L] bool: row attends to column."""
        table = self.table()
        return sees(table[:, :, None], table[:2, None, :])


def from_visible(
    source: int, visible: Sequence[int], offset: int = 0, views: Sequence[int] | None = None
) -> Layout:
    """Any read schedule: `visible` [T] source tokens had been read when each target token was
    written, not decreasing.

    Each row takes what the next one had (methods.md, 3: it predicts the next token); the last of a
    view keeps its own."""
    had = np.asarray(visible, dtype=np.int64)
    if had.size and (had.min() < 0 or had.max() > source):
        raise ValueError(
            f"a target token sees {had.min()} to {had.max()} of {source} source tokens"
        )
    views = None if views is None else np.asarray(views, dtype=np.int64)
    last = (
        np.zeros(len(had), dtype=bool)
        if views is None
        else np.append(views[1:] != views[:-1], True)[: len(had)]
    )
    shifted = np.where(last, had, np.append(had[1:], had[-1:]))
    return Layout(source, shifted, offset, views)


def read_counts(kind: str, source_lengths: Sequence[int], targets: int) -> np.ndarray:
    """[targets] source tokens that each target segment sees: `grouped`, j sees source segments 0 ..
    j, at most all of them; `batch`, all."""
    ends = np.cumsum(source_lengths, dtype=np.int64)
    return (
        ends[np.minimum(np.arange(targets), len(ends) - 1)]
        if kind == "grouped"
        else np.repeat(ends[-1:], targets)
    )


def grouped(
    source_lengths: Sequence[int], target_lengths: Sequence[int], offset: int = 0
) -> Layout:
    """Target segment j sees source segments 0 .. j, at most all of them."""
    counts = read_counts("grouped", source_lengths, len(target_lengths))
    return from_visible(sum(source_lengths), np.repeat(counts, target_lengths), offset)


def batch(source: int, target: int, offset: int = 0) -> Layout:
    """Every target token sees the whole source."""
    return from_visible(source, np.full(target, source), offset)


def arrange(
    kind: str,
    segments: Sequence[Sequence[int]],
    opening: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
    forced: Sequence[bool] = (),
    offset: int = 0,
) -> dict:
    """The token fields of a `Trajectory`, from what was read and written.

    Args:
        kind: `grouped`, `batch` or `interleaved`.
        segments: the source's.
        opening: the forced target segments before the first thought.
        written: the thoughts, then the deep segment with the answer.
        forced: which of `written` had their last token put there at the limit; () for none.
        offset: position of the first target token; unused where interleaved.

    Returns:
        `prompt_ids`, `completion_ids`, `layout`, and [T] for the completion: `sampled` and `slots`.
    """
    # the row before it is the source's last, which has read it all
    if kind != "interleaved" and not any(opening):
        raise ValueError("a target starts with a forced token: nothing may predict it")
    targets = [*opening, *written]
    parts = [(segment, -1) for segment in segments]
    places = [(target, max(index - len(opening), -1)) for index, target in enumerate(targets)]
    if kind == "interleaved":
        parts = [part for pair in zip_longest(parts, places) for part in pair if part is not None]
        first = next(index for index, (_, slot) in enumerate(parts) if slot == 0)
    else:
        first = len(parts)
        parts += places
    lengths = [len(tokens) for tokens, _ in parts]
    ids, start = [token for tokens, _ in parts for token in tokens], sum(lengths[:first])
    slots = np.repeat([slot for _, slot in parts], lengths)
    sampled = slots >= 0
    for end, (_, slot) in zip(np.cumsum(lengths), parts):
        if forced and slot >= 0 and forced[slot]:
            sampled[end - 1] = False
    layout = None
    if kind == "grouped":
        layout = grouped([len(s) for s in segments], [len(t) for t in targets], offset)
    elif kind == "batch":
        layout = batch(start, len(ids) - start, offset)
    return {
        "prompt_ids": ids[:start],
        "completion_ids": ids[start:],
        "layout": layout,
        "sampled": sampled[start:],
        "slots": slots[start:],
    }


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as transformers' sdpa and eager attention both take it: 0 where a row attends,
    else the lowest number, so that a row that attends to nothing (padding) gives no NaN."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )


@torch.no_grad()
def check_layouts(model, states: Callable[[list[int], Layout], torch.Tensor]) -> None:
    """Prove on eleven tokens that a model keeps to a layout: changing any one of them must move the
    hidden states of exactly those that see it.

    Args:
        model: a Hugging Face model.
        states: its hidden states [L, H] of token ids [L] under a layout.

    Raises:
        ModelError: it does not, as with attention that ignores a mask of its caller's, or cannot,
            as with a window.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if others or getattr(config, "sliding_window", None):
        raise ModelError(
            f"{name} has {others[0] if others else 'sliding_attention'} layers: streaming.layout grouped "
            "and batch need full attention in all of them; use streaming.layout=interleaved"
        )
    layout = grouped([3, 3], [2, 3])
    ids = list(range(layout.length))
    try:
        before = states(ids, layout).float()
        moved = []
        for column in ids:
            after = states([i + len(ids) if i == column else i for i in ids], layout).float()
            moved.append((after - before).norm(dim=-1) > 1e-5 * before.norm(dim=-1))
    # what an implementation makes of a mask it does not know is its own affair
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{name} fails under a streaming mask with attention {config._attn_implementation}: {reason}; "
            "try model.attn_implementation=packed or sdpa"
        ) from error
    if not torch.equal(torch.stack(moved, 1).cpu(), torch.from_numpy(layout.mask())):
        raise ModelError(
            f"{name} does not keep to a streaming mask with attention {config._attn_implementation}; try "
            "model.attn_implementation=packed or sdpa"
        )
