"""A policy that is small enough for all its completions to be counted, and exact sums over them.

Letters: P prefixes at which a token is drawn, V vocabulary, H hidden size, L tokens of a row.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rollouts.layout import Layout

# The tokens of the plain world. `STOP` ends a completion; a teacher has an end token of its own.
VOCAB, STOP, TEACHER_STOP, RIGHT = 4, 0, 3, 1
TEXTS = ("<end>", "\\boxed{7}", "a", "b")
PROMPTS = ((2, 3), (1,), (3, 1, 2))
POSITIONS = 64


class Head(nn.Module):
    """A linear head [V, H] with a bias."""

    softcap = None

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)


class TinyPolicy(nn.Module):
    """Attention of equal weights over what a token sees, one nonlinearity, a linear head; float64.

    A hidden state depends on each token that is seen and on its position. So a wrong mask, position
    or row changes it. The head has one row more than the vocabulary, as padded heads have.

    Args:
        seed: of the weights.
        vocab: the number of tokens.
        width: H.
        float32_states: round the hidden states to float32 numbers. An annotation then keeps a
            teacher's without an error.
    """

    def __init__(self, seed: int, vocab: int = VOCAB, width: int = 6, float32_states: bool = False):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.vocab, self.float32_states = vocab, float32_states
        self.own = nn.Parameter(weights(vocab, width))
        self.seen = nn.Parameter(2 * weights(vocab, width))
        self.place = nn.Parameter(weights(POSITIONS, width))
        self.head = Head(weights(vocab + 1, width), weights(vocab + 1))

    def states(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [L, H] of ids and positions [L] under a mask [L, L] bool."""
        share = mask.double() / mask.sum(1, keepdim=True)
        states = torch.tanh(self.own[ids] + share @ (self.seen[ids] * self.place[positions]))
        return states.float().double() if self.float32_states else states

    def hidden(self, batch) -> Tensor:
        """Hidden states [T, H] that predict the targets of a micro-batch, as `Policy.hidden`."""
        lengths = [end - start for start, end in itertools.pairwise(batch.bounds)]
        layouts = batch.layouts or [Layout(length) for length in lengths]
        masks = [torch.from_numpy(layout.mask()) for layout in layouts]
        mask = torch.block_diag(*masks).bool()
        states = self.states(batch.input_ids[0], batch.position_ids[0], mask)
        return states.index_select(0, batch.rows)

    def forward(self, batch, function: Callable):
        """`function(head, hidden [T, H], batch)`, as `Policy.forward`."""
        return function(self.head, self.hidden(batch), batch)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[V], of the token after `ids` in one plain sequence."""
        row = torch.tensor(ids)
        mask = torch.ones(len(row), len(row), dtype=torch.bool).tril()
        state = self.states(row, torch.arange(len(row)), mask)[-1]
        return (self.head.weight @ state + self.head.bias)[: self.vocab]

    def gradient(self) -> Tensor:
        """The gradient of all weights, flat; 0 where a weight has none."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]
        return torch.cat([part.flatten() for part in parts])

    def gradient_of(self, loss: Tensor) -> Tensor:
        """The gradient of a scalar by all weights, flat."""
        weights = list(self.parameters())
        parts = torch.autograd.grad(loss, weights, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])


@dataclass(frozen=True)
class Completion:
    """One way in which a prompt can go on.

    Attributes:
        ids: its tokens, with the stop token where it ends on one.
        places: at each token, the index of the prefix before it.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def finish_reason(self) -> str:
        return "stop" if self.ids[-1] == STOP else "length"


class Tree:
    """All completions of at most `limit` tokens.

    Attributes:
        prefixes: the P prefixes at which a token is drawn.
        completions: 40 of them at a limit of 3.
    """

    def __init__(self, limit: int, vocab: int = VOCAB):
        letters = [token for token in range(vocab) if token != STOP]
        self.limit = limit
        self.prefixes = [
            prefix
            for length in range(limit)
            for prefix in itertools.product(letters, repeat=length)
        ]
        index = {prefix: place for place, prefix in enumerate(self.prefixes)}
        ends = [
            (*prefix, token)
            for prefix in self.prefixes
            for token in range(vocab)
            if token == STOP or len(prefix) == limit - 1
        ]
        self.completions = [
            Completion(ids, tuple(index[ids[:end]] for end in range(len(ids)))) for ids in ends
        ]

    def log_probs(
        self, policy: TinyPolicy, prompt: Sequence[int], temperature: float = 1.0
    ) -> Tensor:
        """[P, V], differentiable."""
        rows = [policy.logits([*prompt, *prefix]) for prefix in self.prefixes]
        return (torch.stack(rows) / temperature).log_softmax(-1)

    def reach(self, log_probs: Tensor) -> Tensor:
        """[P], the probability that a completion comes to each prefix; detached."""
        index = {prefix: place for place, prefix in enumerate(self.prefixes)}
        reach: list[Tensor] = []
        for prefix in self.prefixes:
            if not prefix:
                reach.append(torch.ones((), dtype=torch.float64))
                continue
            before = index[prefix[:-1]]
            reach.append(reach[before] * log_probs[before, prefix[-1]].detach().exp())
        return torch.stack(reach)

    def log_prob(self, log_probs: Tensor, completion: Completion) -> Tensor:
        """The log-prob of a whole completion."""
        return log_probs[list(completion.places), list(completion.ids)].sum()


@functools.cache
def tree(limit: int) -> Tree:
    return Tree(limit)


@dataclass(frozen=True)
class Exact:
    """The student and the teacher on one prompt, as differentiable tables.

    Attributes:
        student, teacher: log-probs [P, V] in nats; the student's are differentiable.
        reach: [P], under the student, detached.
    """

    policy: TinyPolicy
    student: Tensor
    teacher: Tensor
    reach: Tensor

    @classmethod
    def of(
        cls,
        policy: TinyPolicy,
        teacher: TinyPolicy,
        limit: int = 3,
        prompt: Sequence[int] = PROMPTS[0],
        temperature: float = 1.0,
    ) -> Exact:
        nodes = tree(limit)
        student = nodes.log_probs(policy, prompt, temperature)
        with torch.no_grad():
            taught = nodes.log_probs(teacher, prompt, temperature)
        return cls(policy, student, taught, nodes.reach(student))

    def of_divergence(self, divergence: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The gradient of the expected sum over tokens of a divergence of each prefix.

        Args:
            divergence: maps (student, teacher) log-probs [P, V] to [P]. The visits to the prefixes
                are constant, as in distillation on the student's samples.
        """
        values = divergence(self.student, self.teacher)
        return self.policy.gradient_of((self.reach * values).sum())

    def of_rewards(self, rewards: Tensor) -> Tensor:
        """The expected gradient of - sum_t r_t log q_t for constant rewards [P, V]."""
        drawn = self.reach[:, None] * self.student.detach().exp()
        return self.policy.gradient_of(-(drawn * rewards.detach() * self.student).sum())
