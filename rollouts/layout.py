"""The streaming layouts: where each token of [source | target] stands, and what it sees.

- `grouped`: source and target have positions of their own. The source is causal and never sees the
  target. A target token sees the target before it, and the source segments that were read when it
  was written. This is StreamingThinker (arXiv 2510.17238) with group position encoding (arXiv
  2505.16983); docs/specification.md, 3.2.
- `batch`: the same, with the whole source read first.
- `interleaved`: the order of arrival, natural positions and a causal mask. It needs no `Layout`.

All masks are one rule, `sees`, which broadcasts. Nothing loops over pairs.

Letters: S source tokens, T target tokens, L = S + T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from recipes.errors import ModelError, first_line

# Groups. The group of a target token is its view, 0 or more.
SOURCE, PADDING = -1, -2


def sees(query, key):
    """Whether a query attends to a key: the rule of every mask, dense, cached or blockwise.

    Args:
        query: (group, index, limit), arrays or tensors that broadcast with those of the keys.
            `index` is the place among the tokens of the group. `limit` is the number of source
            tokens that the query sees, besides its own group's up to itself. It is 0 for a source
            token. Padding sees padding only.
        key: (group, index).

    Returns:
        bool, of the broadcast shape.
    """
    (group, index, limit), (key_group, key_index) = query, key
    return ((key_group == group) & (key_index <= index)) | (
        (key_group == SOURCE) & (key_index < limit)
    )


@dataclass(frozen=True)
class Layout:
    """[source | target], in which a target row sees a prefix of the source.

    The source is causal and blind to the target. Without a target the layout is a plain causal
    sequence of S tokens.
    """

    source: int  # S
    # [T] source tokens that each target row sees, after the shift by one: row t predicts token
    # t + 1.
    visible: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    offset: int = 0  # position of the first target token
    # [T], in blocks. Targets of different views do not see one another, and the positions of each
    # view start at `offset`. None: one view.
    views: np.ndarray | None = None

    @property
    def length(self) -> int:
        return self.source + len(self.visible)

    def table(self) -> np.ndarray:
        """[3, L] int64: group, index and limit of each token, as `sees` reads them."""
        count = len(self.visible)
        views_T = np.zeros(count, dtype=np.int64)
        if self.views is not None:
            views_T = np.asarray(self.views, dtype=np.int64)
        place_T = np.arange(count)
        # The index of a target token starts anew with each view.
        first_T = np.append(True, views_T[1:] != views_T[:-1])[:count]
        start_T = np.maximum.accumulate(np.where(first_T, place_T, 0))
        table = np.zeros((3, self.length), dtype=np.int64)
        group_L, index_L, limit_L = table
        group_L[: self.source] = SOURCE
        group_L[self.source :] = views_T
        index_L[: self.source] = np.arange(self.source)
        index_L[self.source :] = place_T - start_T
        limit_L[self.source :] = self.visible
        return table

    def positions(self) -> np.ndarray:
        """[L] int64: the position id of each token."""
        group, index, _ = self.table()
        return index + np.where(group == SOURCE, 0, self.offset)

    def mask(self) -> np.ndarray:
        """[L, L] bool: row attends to column."""
        table = self.table()
        return sees(table[:, :, None], table[:2, None, :])


def from_visible(
    source: int,
    visible: Sequence[int] | np.ndarray,
    offset: int = 0,
    views: Sequence[int] | None = None,
) -> Layout:
    """The layout of any read schedule.

    A row predicts the next token, so it sees what that token's schedule says
    (docs/specification.md, 3.2). The last row of a view keeps its own.

    Args:
        source: S.
        visible: [T] source tokens that were read when each target token was written, not
            decreasing.
        offset: position of the first target token.
        views: [T] the view of each target token, in blocks; None for one view.

    Raises:
        ValueError: a target token sees more source tokens than there are.
    """
    visible_T = np.asarray(visible, dtype=np.int64)
    if visible_T.size and (visible_T.min() < 0 or visible_T.max() > source):
        raise ValueError(
            f"a target token sees {visible_T.min()} to {visible_T.max()} of {source} source tokens"
        )
    last_T = np.zeros(len(visible_T), dtype=bool)
    if views is not None:
        views = np.asarray(views, dtype=np.int64)
        last_T = np.append(views[1:] != views[:-1], True)[: len(visible_T)]
    next_T = np.append(visible_T[1:], visible_T[-1:])
    return Layout(source, np.where(last_T, visible_T, next_T), offset, views)


def read_counts(kind: str, source_lengths: Sequence[int], targets: int) -> np.ndarray:
    """[targets] source tokens that each target segment sees.

    In `grouped`, target segment j sees source segments 0 .. j, at most all of them. In `batch` it
    sees all of them.
    """
    ends = np.cumsum(source_lengths, dtype=np.int64)
    if kind == "grouped":
        return ends[np.minimum(np.arange(targets), len(ends) - 1)]
    return np.repeat(ends[-1:], targets)


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

    Raises:
        ValueError: nothing may predict the first target token, so it must be forced.
    """
    # The row before the first target token is the source's last, which has read everything.
    if kind != "interleaved" and not any(opening):
        raise ValueError("a target starts with a forced token: nothing may predict it")
    targets = [*opening, *written]
    parts, first = _ordered(kind, segments, targets, len(opening))
    lengths = [len(tokens) for tokens, _ in parts]
    ids = [token for tokens, _ in parts for token in tokens]
    start = sum(lengths[:first])
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


def _ordered(
    kind: str,
    segments: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    opening: int,
) -> tuple[list[tuple[Sequence[int], int]], int]:
    """All segments in the order of the sequence, and where the completion starts.

    Args:
        kind: `grouped`, `batch` or `interleaved`.
        segments: the source's.
        targets: the target's, of which the first `opening` are forced.

    Returns:
        (tokens, slot) of each segment, with slot -1 for source and opening; and the index of the
        first segment of the completion.
    """
    source = [(segment, -1) for segment in segments]
    target = [(tokens, max(index - opening, -1)) for index, tokens in enumerate(targets)]
    if kind != "interleaved":
        return source + target, len(source)
    pairs = zip_longest(source, target)
    parts = [part for pair in pairs for part in pair if part is not None]
    return parts, next(index for index, (_, slot) in enumerate(parts) if slot == 0)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as transformers' sdpa and eager attention both take it.

    It is 0 where a row attends, else the lowest number. So a row that attends to nothing, which is
    padding, gives no NaN.
    """
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, torch.finfo(dtype).min)


@torch.no_grad()
def check_layouts(model, states: Callable[[list[int], Layout], Tensor]) -> None:
    """Prove on eleven tokens that a model keeps to a layout.

    Changing any one token must move the hidden states of exactly those that see it.

    Args:
        model: a Hugging Face model.
        states: its hidden states [L, H] of token ids [L] under a layout.

    Raises:
        ModelError: the model does not keep to it, as with attention that ignores a mask of its
            caller's, or it cannot, as with a window.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    layer_types = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "sliding_window", None):
        layer_types.add("sliding_attention")
    if others := sorted(layer_types - {"full_attention"}):
        raise ModelError(
            f"{name} has {others[0]} layers: streaming.layout grouped and batch need full "
            "attention in all of them; use streaming.layout=interleaved"
        )
    layout = grouped([3, 3], [2, 3])
    attention = config._attn_implementation
    try:
        influence = _influence(states, layout)
    # What an implementation makes of a mask that it does not know is its own affair.
    except Exception as error:
        reason = first_line(error)
        raise ModelError(
            f"{name} fails under a streaming mask with attention {attention}: {reason}; "
            "try model.attn_implementation=packed or sdpa"
        ) from error
    if not torch.equal(influence, torch.from_numpy(layout.mask())):
        raise ModelError(
            f"{name} does not keep to a streaming mask with attention {attention}; "
            "try model.attn_implementation=packed or sdpa"
        )


def _influence(states: Callable[[list[int], Layout], Tensor], layout: Layout) -> Tensor:
    """[L, L] bool: the row's hidden state moves with the column's token."""
    ids = list(range(layout.length))
    before = states(ids, layout).float()
    columns = []
    for column in ids:
        other = list(ids)
        other[column] += len(ids)
        after = states(other, layout).float()
        change = (after - before).norm(dim=-1)
        columns.append(change > 1e-5 * before.norm(dim=-1))
    return torch.stack(columns, 1).cpu()
