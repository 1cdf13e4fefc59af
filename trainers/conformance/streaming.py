"""HRPO on a fixed group of streaming completions, and streaming SFT under each layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rollouts.data.examples import Example, Prompt
from rollouts.data.marks import TOKENS
from rollouts.layout import arrange
from rollouts.trajectory import Trajectory
from trainers.conformance.generic import Method
from trainers.conformance.report import SINGLE, Case, agree
from trainers.conformance.stand_ins import ExactAnnotations, Words
from trainers.conformance.subjects import Setup, sampled_log_probs, verify
from trainers.conformance.world import TinyPolicy

TEXTS = ("<end>", *TOKENS, "\\boxed{7}", "\\boxed{8}", "a", "b", " ")
END, SEP, EOQ, EOS, EOT, EOR, EOA, SKIP, RIGHT, WRONG, A, B, SPACE = range(len(TEXTS))
SEGMENTS = ((A, SEP), (B, EOQ), (A, EOS), (B, A, EOS))
OPENING = ((SEP,), (EOQ,))
# The most tokens of a thought, and of the deep segment.
CAP, LIMIT = 4, 8
# Two thoughts and the deep segment of each completion of the group; the thought that reaches the
# cap is closed by force, and the last completion is cut.
GROUP = (
    ((SKIP,), (A, EOT), (B, EOR, RIGHT, EOA)),
    ((A, B, EOT), (SKIP,), (EOR, RIGHT, EOA)),
    ((A, EOT), (B, EOT), (B, A, EOR, WRONG, EOA)),
    ((A, B, A, EOT), (SKIP,), (A, EOR, RIGHT, EOA)),
    ((SKIP,), (SKIP,), (B, EOR)),
)
FORCED = 3
KEYS = (
    "recipe=adasr",
    f"streaming.max_thought_tokens={CAP}",
    "grpo.kl_beta=0",
    "grpo.importance_cap=null",
    "train.minibatches=1",
)


def prompt() -> Prompt:
    ids = tuple(itertools.chain(*SEGMENTS))
    example = Example(
        0, [], "7", thoughts=(TEXTS[SKIP], "a"), deep="b", final=TEXTS[RIGHT], question="b"
    )
    return Prompt(0, ids, Words(TEXTS).decode(ids), example, SEGMENTS, OPENING)


def group() -> list[Trajectory]:
    """The completions of `GROUP` in the layout `grouped`."""
    drawn = []
    for sample, written in enumerate(GROUP):
        forced = (sample == FORCED, False, False)
        reason = "length" if sample == len(GROUP) - 1 else "stop"
        sequence = arrange("grouped", SEGMENTS, OPENING, written, forced)
        drawn.append(
            Trajectory(0, sample, finish_reason=reason, annotations=ExactAnnotations(), **sequence)
        )
    return drawn


class Streamed(Method):
    """A method that learns from streaming completions, or reads them from data."""

    enumerates = False

    def drawn(self, **options) -> tuple[Setup, list[Trajectory]]:
        setup = Setup(
            self.overrides,
            samples=len(GROUP),
            prompts=[prompt()],
            texts=TEXTS,
            limit=LIMIT,
            **options,
        )
        setup.engine.given = group()
        return setup, setup.draw()


def relative(rewards: Sequence[float]) -> np.ndarray:
    """(R - mean) / (std + 1e-6); 0 where all are equal."""
    values = np.array(rewards)
    if np.ptp(values) == 0:
        return np.zeros(len(values))
    return (values - values.mean()) / (values.std() + 1e-6)


class Stage:
    """What specification 4.2 says of one completion of the group.

    Attributes:
        whole, local, deep: R_g, R_s and R_d.
        slots: the local reward of each thought by itself.
    """

    def __init__(self, sample: int, options):
        *thoughts, deep = GROUP[sample]
        w, alpha, beta = options.format_weight, options.streaming_weight, options.deep_weight
        accuracy = verify(Words(TEXTS).decode(deep), "7")
        closed = [
            thought == (SKIP,) or (thought[-1] == EOT and not (sample == FORCED and place == 0))
            for place, thought in enumerate(thoughts)
        ]
        ended = sample != len(GROUP) - 1
        think_d = accuracy * (1 - len(deep) / LIMIT)
        written = sum(map(len, thoughts))
        think_s = accuracy * (1 - written / (len(thoughts) * CAP))
        format_s = sum(closed) / len(thoughts)
        self.whole = accuracy + w * format_s * ended
        self.local = w * format_s + alpha * think_s + options.deep_credit * beta * think_d
        self.deep = w * ended + accuracy + beta * think_d
        self.slots = [
            w * is_closed
            + alpha * accuracy * (1 - len(thought) / CAP)
            + options.deep_credit * beta * think_d
            for is_closed, thought in zip(closed, thoughts)
        ]


def advantages(options) -> list[np.ndarray]:
    """The advantage of each token after the opening, by specification 4.3."""
    stages = [Stage(sample, options) for sample in range(len(GROUP))]
    whole, local, deep = (
        relative([getattr(stage, name) for stage in stages]) for name in ("whole", "local", "deep")
    )
    slots = np.array([relative(column) for column in zip(*(stage.slots for stage in stages))])
    ends, weight, tokens = {EOT, SKIP, EOR, EOA, END}, options.local_weight, []
    for sample, written in enumerate(GROUP):
        of_tokens = []
        for place, ids in enumerate(written):
            own = local[sample]
            if place == len(written) - 1:
                own = deep[sample]
            elif options.granularity == "sentence":
                own = slots[place, sample]
            for token in ids:
                reached = options.granularity != "boundary_token" or token in ends
                own_part = own if reached else whole[sample]
                of_tokens.append(weight * own_part + (1 - weight) * whole[sample])
        tokens.append(np.array(of_tokens))
    return tokens


def of_advantages(policy: TinyPolicy, given: list[np.ndarray]) -> Tensor:
    """The gradient of - sum A log q / N over the sampled tokens of the group."""
    loss, count = torch.zeros((), dtype=torch.float64), 0
    opening = sum(map(len, OPENING))
    for trajectory, values in zip(group(), given):
        chosen = torch.from_numpy(trajectory.sampled[opening:])
        logs = sampled_log_probs(policy, trajectory)[opening:]
        loss = loss - (torch.from_numpy(values) * logs)[chosen].sum()
        count += int(chosen.sum())
    return policy.gradient_of(loss / count)


def check_hrpo(*keys: str) -> None:
    setup, drawn = Streamed((*KEYS, *keys)).drawn()
    expected = of_advantages(setup.policy, advantages(setup.config.hrpo))
    agree(setup.update(drawn).gradient, expected, SINGLE)


def local_weight_0() -> None:
    """lambda = 0 is GRPO on R_g."""
    setup, drawn = Streamed((*KEYS, "hrpo.local_weight=0")).drawn()
    options = setup.config.hrpo
    whole = relative([Stage(sample, options).whole for sample in range(len(GROUP))])
    lengths = [sum(map(len, written)) for written in GROUP]
    given = [np.full(length, value) for length, value in zip(lengths, whole)]
    agree(setup.update(drawn).gradient, of_advantages(setup.policy, given), SINGLE)


def weights_0() -> None:
    """Without weights of form and brevity, a thought has no local advantage."""
    keys = (
        "hrpo.local_weight=1",
        "hrpo.format_weight=0",
        "hrpo.streaming_weight=0",
        "hrpo.deep_credit=0",
    )
    setup, drawn = Streamed((*KEYS, *keys)).drawn()
    options = setup.config.hrpo
    deep = relative([Stage(sample, options).deep for sample in range(len(GROUP))])
    given = []
    for written, value in zip(GROUP, deep):
        *thoughts, last = written
        zeros = np.zeros(sum(map(len, thoughts)))
        given.append(np.append(zeros, np.full(len(last), value)))
    agree(setup.update(drawn).gradient, of_advantages(setup.policy, given), SINGLE)


def check_layout(layout: str) -> None:
    """Cross-entropy on what the model writes, as it sees it under the layout."""
    setup, drawn = reading(layout).drawn()
    logs = [sampled_log_probs(setup.policy, t)[torch.from_numpy(t.sampled)] for t in drawn]
    agree(setup.update(drawn).gradient, setup.policy.gradient_of(-torch.cat(logs).mean()))


def reading(layout: str) -> Streamed:
    keys = ("recipe=streaming_sft", f"streaming.layout={layout}")
    if layout == "interleaved":
        keys = (*keys, "rollout.engine=hf")
    return Streamed(keys, component="trainer=streaming_sft")


def cases() -> Iterator[Case]:
    """Of `trainer=hrpo`, `hrpo.granularity` and `trainer=streaming_sft`."""
    component = "trainer=hrpo"
    yield from Streamed(KEYS, component=component).cases()
    for granularity in ("stage", "sentence", "boundary_token"):
        key = f"hrpo.granularity={granularity}"

        def check(key: str = key) -> None:
            check_hrpo(key, "hrpo.local_weight=0.3")

        for named in (component, key):
            yield Case(named, "expected gradient", f"fixed group, {granularity}", check)
    yield Case(component, "limits", "lambda = 0: GRPO on R_g", local_weight_0)
    yield Case(component, "limits", "weights 0", weights_0)
    component = "trainer=streaming_sft"
    for layout in ("grouped", "batch", "interleaved"):
        yield from reading(layout).cases(layout)

        def layout_check(layout: str = layout) -> None:
            check_layout(layout)

        yield Case(component, "stated objective", layout, layout_check)
