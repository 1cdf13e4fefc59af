"""The parity gate: trainer and sampler must give the same tokens the same log-probs.

A method learns from samples of the policy. It is the sampler that draws them, with code of its own
for attention, soft-caps, temperature and rounding. So before its first step a run samples a few
completions of its own prompts, and compares three log-probs of each token:

    trainer    packed, with `model.attn_implementation`, as in training
    sampler    what the rollout engine reported
    eager      the trainer's weights, one sequence at a time, with transformers' eager attention

All are in the type of the computation, at `rollout.temperature`. Nothing is truncated: vLLM would
renormalise. The samples have seeds of their own, and no generator of the training moves.

In float32 the largest difference is bounded, in bfloat16 the mean one. How much rounding does
depends on the model. In bfloat16 any two right computations differ by 0.03 nats on average in
smollm2-135m, and by 0.001 in stories-student. So where the default bound is passed, the model's own
rounding is measured: how the trainer's log-probs change when the last bit of the embeddings does.
Twice that is allowed.

The check of a model at load (trainers/core/policy.py) also compares with eager attention. It has
random ids, and the type of the loaded weights, which is float32 where bfloat16 is trained in.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from recipes.errors import TrainingError
from rollouts.trajectory import Trajectory, sample_seed
from trainers.core import distributed
from trainers.modes.plain import make_requests

if TYPE_CHECKING:
    from trainers.core.deepspeed import PolicyEngine
    from trainers.run import Run

PROMPTS = 4  # over all ranks, and at least one on each
NEW_TOKENS = 32
# `rollout.max_mismatch` null, in nats: on the largest difference, and in bfloat16 on the mean one.
MAX_DIFFERENCE, MEAN_DIFFERENCE = 1e-4, 1e-2
OFF = -1
# By default, differences of so many times the model's own rounding are allowed.
ROUNDING_FACTOR = 2
# Of a number, relative to its value.
LAST_BIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
# Eager attention makes [L, L] scores for each head. Longer sequences are compared without it.
EAGER_TOKENS = 2048


@dataclass(frozen=True)
class Token:
    """A sampled token and its log-probs, in nats.

    Attributes:
        row: of the data.
        place: in the completion, from 0.
        eager: None where a sequence is too long for eager attention.
    """

    row: int
    place: int
    token_id: int
    trainer: float
    sampler: float
    eager: float | None

    def gap(self, other: str) -> float:
        """How far the trainer is from `sampler` or `eager`; infinite where one is not finite."""
        gap = abs(self.trainer - getattr(self, other))
        return gap if np.isfinite(gap) else np.inf


@dataclass(frozen=True)
class Bound:
    """The most that log-probs may differ, in nats, and whether that is on average.

    Attributes:
        adapts: it grows with the rounding of a model.
    """

    most: float
    on_average: bool
    adapts: bool

    @classmethod
    def of(cls, config) -> Bound:
        """`rollout.max_mismatch`, or the default of `model.dtype`."""
        on_average = config.model.dtype == "bfloat16"
        given = config.rollout.max_mismatch
        default = MEAN_DIFFERENCE if on_average else MAX_DIFFERENCE
        return cls(default if given is None else given, on_average, adapts=given is None)

    @property
    def statistic(self) -> str:
        return "mean" if self.on_average else "largest"

    def measure(self, differences: Sequence[float]) -> float:
        """What is bounded: their mean or the largest."""
        return float(np.mean(differences) if self.on_average else np.max(differences))


def check_parity(run: Run, engine: PolicyEngine) -> str:
    """Compare trainer, sampler and eager attention on a few completions. A collective.

    Args:
        run: with its rollout engine, which holds the trainer's weights.
        engine: the trainer.

    Returns:
        the line that the run prints about it.

    Raises:
        TrainingError: a difference is above `rollout.max_mismatch`.
    """
    started, config = time.perf_counter(), run.config
    if config.rollout.max_mismatch == OFF:
        return f"parity  not checked: rollout.max_mismatch={OFF}"
    trajectories = sampled(run)
    if any(trajectory.logprobs is None for trajectory in trajectories):
        return f"parity  not checked: rollout.engine={config.rollout.engine} gives no log-probs"
    tokens = [t for part in distributed.gather(scored(run, engine, trajectories)) for t in part]
    bound = Bound.of(config)
    others = ["sampler"] + ["eager"] * all(token.eager is not None for token in tokens)
    found = {other: bound.measure([token.gap(other) for token in tokens]) for other in others}
    if bound.adapts and max(found.values()) > bound.most:
        changes = rounding(run, engine, trajectories)
        bound = replace(bound, most=max(bound.most, ROUNDING_FACTOR * bound.measure(changes)))
    for other, value in found.items():
        if not value <= bound.most:
            raise TrainingError(explained(run, tokens, bound, found, other))
    eager = f"eager attention {found['eager']:.1e}" if "eager" in found else "eager left out"
    return (
        f"parity  {bound.statistic} difference of log-probs on {len(tokens)} tokens: "
        f"sampler {found['sampler']:.1e}, {eager}, at most {bound.most:.3g} nats  "
        f"({time.perf_counter() - started:.1f} s)"
    )


def sampled(run: Run) -> list[Trajectory]:
    """Completions of this rank's part of the first prompts, as many on every rank."""
    each = max(1, PROMPTS // distributed.world_size())
    first = distributed.rank() * each
    prompts = [run.prompts[index % len(run.prompts)] for index in range(first, first + each)]

    def seed(index: int, sample: int) -> int:
        return sample_seed(run.config.seed, 0, index, sample, "parity")

    limit = min(NEW_TOKENS, run.config.rollout.max_new_tokens)
    sampling = run.mode.parity_sampling(run, limit)
    return run.rollout.generate(make_requests(prompts, 1, seed), sampling)


def scored(run: Run, engine: PolicyEngine, trajectories: Sequence[Trajectory]) -> list[Token]:
    """The tokens that the policy chose, with their log-probs. A collective.

    Args:
        run: the run.
        engine: the trainer.
        trajectories: this rank's. They get `old_logprobs`, the trainer's.
    """
    for trajectory in trajectories:
        trajectory.annotations["mask"] = trajectory.sampled_mask
    run.score_policy(trajectories, "old_logprobs")
    eager: list = [None] * len(trajectories)
    longest = max(trajectory.length for trajectory in trajectories)
    if max(distributed.gather(longest)) <= EAGER_TOKENS:
        with eager_attention(engine.policy.model):
            for trajectory in trajectories:
                run.score_policy([trajectory])
        eager = [trajectory.annotations["student_logprobs"] for trajectory in trajectories]
    return [
        Token(
            trajectory.prompt_index,
            int(place),
            trajectory.completion_ids[place],
            float(trajectory.annotations["old_logprobs"][place]),
            float(trajectory.logprobs[place]),
            None if theirs is None else float(theirs[place]),
        )
        for trajectory, theirs in zip(trajectories, eager)
        for place in np.flatnonzero(trajectory.annotations["mask"])
    ]


@contextlib.contextmanager
def eager_attention(model) -> Iterator[None]:
    """The model computes its attention by transformers' eager one."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def rounding(run: Run, engine: PolicyEngine, trajectories: Sequence[Trajectory]) -> list[float]:
    """How the trainer's log-probs change, in nats, with the last bit of the embeddings.

    A collective.

    Args:
        run: the run.
        engine: the trainer.
        trajectories: this rank's, of `scored`.

    Returns:
        the change of each token of all ranks; 0 where it is not finite.
    """
    generator = torch.Generator().manual_seed(0)

    def move(module, inputs, embeddings):
        signs = torch.randint(0, 2, embeddings.shape, generator=generator).double() * 2 - 1
        factors = 1 + LAST_BIT[embeddings.dtype] * signs.to(embeddings.device)
        return (embeddings.double() * factors).to(embeddings.dtype)

    hook = engine.policy.model.get_input_embeddings().register_forward_hook(move)
    try:
        run.score_policy(trajectories)
    finally:
        hook.remove()
    own = []
    for trajectory in trajectories:
        moved, before, mask = (
            trajectory.annotations[name] for name in ("student_logprobs", "old_logprobs", "mask")
        )
        own += np.abs(moved - before)[mask].tolist()
    changes = [change for part in distributed.gather(own) for change in part]
    return [change if np.isfinite(change) else 0.0 for change in changes]


def explained(
    run: Run, tokens: Sequence[Token], bound: Bound, found: dict[str, float], other: str
) -> str:
    """The error: how far the trainer is from `other`, where most, what it may be, what to do."""
    config = run.config
    worst = max(tokens, key=lambda token: token.gap(other))
    eager = "" if worst.eager is None else f", eager attention {worst.eager:.6g}"
    names = {"sampler": f"rollout.engine={config.rollout.engine}", "eager": "eager attention"}
    return (
        f"before step {run.start + 1} the {bound.statistic} difference between the trainer's "
        f"log-probs and those of {names[other]} is {found[other]:.2g} nats, more than "
        f"{bound.most:.3g} (rollout.max_mismatch); it is largest at token "
        f"{run.tokenizer.decode([worst.token_id])!r}, place {worst.place} of the completion of row "
        f"{worst.row}: trainer {worst.trainer:.6g}, sampler {worst.sampler:.6g}{eager}; "
        f"{advice(config, bound, found)}"
    )


def advice(config, bound: Bound, found: dict[str, float]) -> str:
    """What may be the cause, as the three log-probs tell, and what to do."""
    attention = config.model.attn_implementation
    if found.get("eager", 0) > bound.most:
        return (
            f"model.attn_implementation={attention} computes something else than eager: use eager, "
            "and report the model"
        )
    other = "rollout.engine=hf" if config.rollout.engine == "vllm" else "another rollout.engine"
    exact = " or model.dtype=float32" if bound.on_average else ""
    return (
        "the sampler may differ in weights, attention, soft-cap, temperature, vocabulary or type: "
        f"try {other}{exact}; if it only rounds, raise rollout.max_mismatch, and weight tokens by "
        "grpo.importance_cap or reward.importance_cap"
    )
