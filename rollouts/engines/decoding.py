"""A batch of completions while they are written: the state that every decode loop keeps.

A loop of an engine reads

    while len(decoding.live):
        logits = …                                   [R, V], of the next token of each live row
        tokens, logprobs = decoding.propose(logits)
        decoding.write(tokens=tokens, logprobs=logprobs)
        decoding.leave(decoding.on_stop(tokens), …)  rows that stopped, rows that are full

Letters: B requests, R rows that are still live, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rollouts.engines.sampling import sample
from rollouts.trajectory import Request, Sampling


class Columns(Protocol):
    """Whatever has an entry per live row: a key-value cache, or the state of an engine's loop."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows [R] int64, in this order."""


@dataclass
class RowState:
    """Base of dataclasses whose fields are tensors [R, …], with an entry per live row."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


class Decoding:
    """The completions of B requests, of which R are still written.

    Every request draws its uniforms from a generator of its own. So its noise does not depend on
    the requests beside it.

    Args:
        requests: B of them.
        sampling: temperature, truncation and stop tokens.
        limits: the most tokens that each completion can have.
        device: of the logits.
        tables: the dtype of each thing that is written per token, besides `tokens` and `logprobs`.

    Attributes:
        live: [R] int64, the request whose completion each row writes.
        length: [B] int64, the tokens written so far.
        stopped: [B] bool, the last token is a stop token.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        limits: Sequence[int],
        device: torch.device,
        **tables: torch.dtype,
    ):
        self.requests, self.sampling = requests, sampling
        self.uniforms_BT = uniforms(requests, limits).to(device)
        self.limits_B = torch.tensor(limits, device=device)
        self.stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        self.length = torch.zeros_like(self.limits_B)
        self.stopped = torch.zeros_like(self.limits_B, dtype=torch.bool)
        # A completion with a limit of zero is finished before it starts.
        self.live = self.limits_B.nonzero().flatten()
        tables = {"tokens": torch.long, "logprobs": torch.float32, **tables}
        self.tables_BT = {
            name: torch.zeros(self.uniforms_BT.shape, dtype=dtype, device=device)
            for name, dtype in tables.items()
        }

    def propose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the next token of each live row from logits [R, V] float32.

        A row whose proposal is not written meets the same uniform again.

        Returns:
            token ids [R] int64 and their log-probs [R] float32.
        """
        uniforms_R = self.uniforms_BT[self.live, self.written]
        return sample(logits, uniforms_R, self.sampling)

    def write(self, where: Tensor | None = None, **values: Tensor) -> None:
        """Append a token to each live row, or to those of the mask `where` [R].

        Args:
            where: bool; None stands for all.
            values: [R] each, one for every table.
        """
        rows = self.live if where is None else self.live[where]
        place = rows, self.length[rows]
        for name, value_R in values.items():
            self.tables_BT[name][place] = value_R if where is None else value_R[where]
        self.length[rows] += 1

    def on_stop(self, tokens: Tensor) -> Tensor:
        """[R] bool: these tokens [R] are stop tokens."""
        return torch.isin(tokens, self.stop_ids)

    @property
    def written(self) -> Tensor:
        """[R] int64: the number of tokens that each live row has written."""
        return self.length[self.live]

    @property
    def full(self) -> Tensor:
        """[R] bool: the row has as many tokens as its limit."""
        return self.written >= self.limits_B[self.live]

    @property
    def newest(self) -> Tensor:
        """[R] int64: the last token that each live row has written."""
        return self.tables_BT["tokens"][self.live, self.written - 1]

    def leave(self, stopped: Tensor, full: Tensor, *others: Columns) -> None:
        """Take finished rows out of the batch.

        Args:
            stopped: [R] bool, the row ended on a stop token.
            full: [R] bool, the row is at its limit.
            others: what else has an entry per live row. Once no row is left they are not touched.
        """
        self.stopped[self.live] = stopped
        stay = (~(stopped | full)).nonzero().flatten()
        if len(stay) == len(self.live):
            return
        self.live = self.live[stay]
        if len(stay):
            for columns in others:
                columns.select(stay)

    def completions(self) -> Iterator[tuple[Request, dict[str, np.ndarray], str]]:
        """Each request, with its part [T] of every table, and the reason why it finished."""
        tables = {name: table.cpu().numpy() for name, table in self.tables_BT.items()}
        lengths = self.length.tolist()
        reasons = ["stop" if stopped else "length" for stopped in self.stopped.tolist()]
        for row, request in enumerate(self.requests):
            written = {}
            for name, table in tables.items():
                # A copy, so that a trajectory does not keep the whole batch in memory.
                written[name] = table[row, : lengths[row]].copy()
            yield request, written, reasons[row]


def uniforms(requests: Sequence[Request], limits: Sequence[int]) -> Tensor:
    """[B, T] float64 in [0, 1): a stream per request, from its seed; zeros after its limit."""
    streams = []
    for request, limit in zip(requests, limits):
        generator = torch.Generator().manual_seed(request.seed)
        stream = torch.rand(limit, generator=generator, dtype=torch.float64)
        streams.append(stream)
    return pad_sequence(streams, batch_first=True)
