"""Full-distribution objectives, the modes of the terminal stop, and the divisors of a loss."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from trainers.conformance import stated
from trainers.conformance.report import SINGLE, Case, agree
from trainers.conformance.subjects import Setup
from trainers.conformance.token_rewards import limit_case, method
from trainers.conformance.world import STOP, TEACHER_STOP, VOCAB, Exact


def full(*overrides: str):
    """A case's check: the expected gradient is that of a divergence."""

    def against(divergence: stated.Divergence):
        def check() -> None:
            setup = method(*overrides).single()
            agree(setup.expected(), setup.exact().of_divergence(divergence))

        return check

    return against


def cases() -> Iterator[Case]:
    """Of `objective`, `divergence.*`, `reward.terminal_stop` and `train.normalizer`."""
    yield from of_objectives()
    yield from of_top_k()
    yield from of_stops()
    yield from of_normalizers()


def of_objectives() -> Iterator[Case]:
    hot = "rollout.temperature=0.7"
    rows = (
        ("policy_gradient", ("reward.token=log_ratio",), stated.reverse_kl),
        ("policy_gradient", ("reward.token=log_ratio", hot), stated.reverse_kl),
        ("reverse_kl", (), stated.reverse_kl),
        ("reverse_kl", (hot,), stated.reverse_kl),
        ("forward_kl", (), stated.forward_kl),
        ("jsd", ("divergence.jsd_beta=0.5",), stated.jsd(0.5)),
        ("jsd", ("divergence.jsd_beta=0.3",), stated.jsd(0.3)),
        ("power_full", ("reward.alpha=3",), stated.power(3)),
        (
            "power_full",
            ("reward.alpha=2", "reward.normalization=box_cox"),
            stated.power(2, box_cox=True),
        ),
    )
    for name, keys, divergence in rows:
        component = f"objective={name}"
        check = full(component, *keys)(divergence)
        yield Case(component, "stated objective", " ".join(keys), check)
    for name in ("reverse_kl", "forward_kl", "jsd", "power_full", "topk"):
        component = f"objective={name}"
        keys = ("divergence.top_k=2",) if name == "topk" else ()
        yield from method(component, *keys, component=component).cases()
    jsd, power = "objective=jsd", "objective=power_full"
    for beta, divergence, scale in (
        (1e-6, stated.forward_kl, 1e6),
        (1 - 1e-6, stated.reverse_kl, 1e6),
    ):
        key = f"divergence.jsd_beta={beta}"
        setting = f"beta -> {round(beta)}"
        yield limit_case(jsd, setting, (jsd, key), divergence, scale)
    box_cox = "reward.normalization=box_cox"
    near = (power, "reward.alpha=1e-6", box_cox)
    yield limit_case(power, "alpha -> 0", near, stated.reverse_kl, 1)
    yield limit_case(power, "alpha = 1", (power, "reward.alpha=1"), stated.half_squares, 1)


def of_top_k() -> Iterator[Case]:
    """Each support, tail and direction; with all tokens it is the full divergence."""
    component = "objective=topk"
    for support in ("teacher", "student"):
        for tail in ("renormalize", "bucket"):
            for direction in ("reverse_kl", "forward_kl"):
                values = {"support": support, "tail": tail, "direction": direction}
                keys = [f"divergence.top_k_{name}={value}" for name, value in values.items()]
                divergence = stated.top_k(2, support, tail, direction)
                # One computation stands for the objective and each of its keys.
                check = functools.cache(full(component, "divergence.top_k=2", *keys)(divergence))
                for named in (component, *keys):
                    yield Case(named, "stated objective", " ".join(values.values()), check)
    kl = stated.reverse_kl
    yield limit_case(component, "k = V", (component, f"divergence.top_k={VOCAB}"), kl, 1)
    bucket = (component, f"divergence.top_k={VOCAB - 1}", "divergence.top_k_tail=bucket")
    yield limit_case(component, "k = V - 1 with a bucket", bucket, kl, 1)


def of_stops() -> Iterator[Case]:
    for mode in ("raw", "mask", "relabel", "cross_eos"):

        def check(mode: str = mode) -> None:
            keys = (f"reward.terminal_stop={mode}", "reward.token=log_ratio")
            setup = method(*keys).single()
            agree(setup.expected(), of_stop(setup.exact(), mode))

        yield Case(f"reward.terminal_stop={mode}", "expected gradient", "", check)


def of_stop(exact: Exact, mode: str) -> Tensor:
    """The expected gradient where a final stop token counts as the mode says."""
    drawn = exact.reach[:, None] * exact.student.detach().exp()
    scored, taught = exact.student, exact.teacher
    others = [token for token in range(VOCAB) if token != STOP]
    rewards = taught - scored.detach()
    loss = -(drawn * rewards * scored)[:, others].sum()
    student = TEACHER_STOP if mode == "relabel" else STOP
    teacher = STOP if mode == "raw" else TEACHER_STOP
    reward = taught[:, teacher] - scored[:, student].detach()
    if mode != "mask":
        loss = loss - (drawn[:, STOP] * reward * scored[:, student]).sum()
    return exact.policy.gradient_of(loss)


def of_normalizers() -> Iterator[Case]:
    for name in ("token_mean", "sequence_mean", "max_length", "microbatch_token_mean"):
        for ranks in (1, 2, 12):

            def check(name: str = name, ranks: int = ranks) -> None:
                keys = f"train.normalizer={name}", "reward.terminal_stop=mask"
                setup, drawn = method(*keys).drawn()
                budget = 4096 if name != "microbatch_token_mean" else 1
                ours = setup.update(drawn, ranks=ranks, budget=budget).gradient
                # Sequence means are weights of float32.
                agree(ours, written_out(setup, drawn, name), SINGLE)

            yield Case(f"train.normalizer={name}", "divisor", f"{ranks} ranks", check)


def written_out(setup: Setup, trajectories, normalizer: str) -> Tensor:
    """The gradient of an update whose sum is divided as `train.normalizer` says.

    The sums of single trajectories come from updates of one. `microbatch_token_mean` has one
    trajectory in each micro-batch.
    """
    sums, lengths = [], []
    for trajectory in trajectories:
        alone = setup.update([trajectory], normalizer="token_mean")
        sums.append(alone.tokens * alone.gradient)
        lengths.append(alone.tokens)
    counted = [length for length in lengths if length]
    if normalizer in ("sequence_mean", "microbatch_token_mean"):
        means = [total / max(length, 1) for total, length in zip(sums, lengths)]
        return torch.stack(means).sum(0) / len(counted)
    divisor = len(counted) * max(counted) if normalizer == "max_length" else np.sum(counted)
    return torch.stack(sums).sum(0) / float(divisor)
