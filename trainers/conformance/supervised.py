"""Cross-entropy on given targets, on kept samples, and on several views of one target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rollouts.data.examples import Example, Prompt
from rollouts.layout import Layout
from rollouts.trajectory import Trajectory
from trainers.conformance.generic import Method
from trainers.conformance.report import SINGLE, Case, agree, vanish
from trainers.conformance.stand_ins import Words
from trainers.conformance.stated import top_k
from trainers.conformance.streaming import SEP, TEXTS, A, B
from trainers.conformance.subjects import Setup, log_probs, sampled_log_probs, verify
from trainers.conformance.world import PROMPTS, STOP, tree
from trainers.conformance.world import TEXTS as PLAIN

ONPOLICY = ("recipe=onpolicy_sft", "train.normalizer=token_mean", "train.minibatches=1")


class Read(Method):
    """A method that reads its sequences from plain data."""

    enumerates = False

    def drawn(self, **options) -> tuple[Setup, list[Trajectory]]:
        setup = Setup(self.overrides, prompts=3, **options)
        return setup, setup.draw()


class Views(Method):
    """ProactiveLLM on sources of one to three units."""

    enumerates = False

    def drawn(self, units: int = 3, **options) -> tuple[Setup, list[Trajectory]]:
        prompts = [simultaneous_prompt(0, units), simultaneous_prompt(1, min(units, 2))]
        setup = Setup(self.overrides, prompts=prompts, texts=TEXTS, **options)
        return setup, setup.draw()


def simultaneous_prompt(index: int, units: int) -> Prompt:
    segments = ((SEP,), (A,), (B, A), (B,))[: units + 1]
    ids = tuple(token for segment in segments for token in segment)
    example = Example(index, [], solution=("a b", "b a a")[index])
    return Prompt(index, ids, Words(TEXTS).decode(ids), example, segments, ((SEP,),))


def proactive(*overrides: str) -> Views:
    return Views(("recipe=proactivellm", *overrides), component="trainer=proactivellm")


def read_data() -> None:
    setup, drawn = Read(("recipe=sft",)).drawn()
    logs = [sampled_log_probs(setup.policy, trajectory) for trajectory in drawn]
    agree(setup.update(drawn).gradient, setup.policy.gradient_of(-torch.cat(logs).mean()))


def kept_samples() -> None:
    """The expected sum is the policy gradient of R = correct and ended by itself."""
    setup = Setup(ONPOLICY)
    nodes = tree(setup.limit)
    table = nodes.log_probs(setup.policy, PROMPTS[0])
    reward = torch.zeros((), dtype=torch.float64)
    for one in nodes.completions:
        right = verify("".join(PLAIN[token] for token in one.ids if token != STOP), "7")
        if right and one.finish_reason == "stop":
            reward = reward + nodes.log_prob(table, one).exp()
    agree(setup.expected(), setup.policy.gradient_of(-reward))


def view(trajectory: Trajectory, number: int) -> Trajectory:
    """One view of the target, as a sequence of its own."""
    layout = trajectory.layout
    inside = layout.views == number
    count = int(inside.sum())
    alone = Layout(layout.source, layout.visible[inside], layout.offset)
    return replace(
        trajectory,
        completion_ids=trajectory.completion_ids[:count],
        sampled=trajectory.sampled[:count],
        layout=alone,
    )


def of_views(setup: Setup, drawn: list[Trajectory]) -> Tensor:
    """The gradient of w_b L_batch + w_s L_MSLM + lambda L_SPSD, a forward for each view."""
    options, count = setup.config.proactive, 0
    total = torch.zeros((), dtype=torch.float64)
    divergence = top_k(min(options.top_k, len(TEXTS)), "teacher", options.top_k_tail, "forward_kl")
    for trajectory in drawn:
        views = [view(trajectory, number) for number in range(trajectory.layout.views.max() + 1)]
        whole, *parts = views
        chosen = torch.from_numpy(whole.sampled)
        count += int(chosen.sum())
        teacher = log_probs(setup.policy, whole).detach()[chosen]
        total = total - options.batch_weight * sampled_log_probs(setup.policy, whole)[chosen].sum()
        for part in parts:
            student = log_probs(setup.policy, part)[chosen]
            nll = -sampled_log_probs(setup.policy, part)[chosen].sum()
            kl = divergence(student, teacher).sum()
            total = total + (options.stream_weight * nll + options.kl_weight * kl) / len(parts)
    return setup.policy.gradient_of(total / count)


def check_views(*overrides: str) -> None:
    setup, drawn = proactive(*overrides).drawn()
    # The weights of the terms are float32.
    agree(setup.update(drawn).gradient, of_views(setup, drawn), SINGLE)


def all_read() -> None:
    """With one unit both views are the same, so the KL has no gradient."""
    keys = ("proactive.batch_weight=0", "proactive.stream_weight=0", "proactive.kl_weight=1")
    setup, drawn = proactive(*keys).drawn()
    scale = float(setup.update(drawn).gradient.norm())
    setup, drawn = proactive(*keys).drawn(units=1)
    vanish(setup.update(drawn).gradient, scale)


def kl_weight_0() -> None:
    """A weight of 0 is a term left out."""
    near, without = "proactive.kl_weight=1e-12", "proactive.kl_weight=0"
    gradients = [setup.update(drawn).gradient for setup, drawn in map(_drawn, (near, without))]
    agree(*gradients, SINGLE)


def _drawn(key: str) -> tuple[Setup, list[Trajectory]]:
    return proactive(key).drawn()


def cases() -> Iterator[Case]:
    """Of `trainer=sft`, `onpolicy_sft` and `proactivellm`."""
    yield from Read(("recipe=sft",), component="trainer=sft").cases()
    yield Case("trainer=sft", "stated objective", "", read_data)
    yield from Method(ONPOLICY, component="trainer=onpolicy_sft").cases()
    yield Case("trainer=onpolicy_sft", "stated objective", "- E[R]", kept_samples)
    component = "trainer=proactivellm"
    yield from proactive("proactive.kl_weight=0.5").cases()
    for keys in (
        ("proactive.kl_weight=0.5",),
        ("proactive.kl_weight=0.7", "proactive.schedules=2", "proactive.top_k=5"),
        ("proactive.batch_weight=0.3", "proactive.stream_weight=2"),
    ):

        def check(keys: tuple[str, ...] = keys) -> None:
            check_views(*keys)

        yield Case(component, "stated objective", " ".join(keys), check)
    for tail in ("renormalize", "bucket"):
        key = f"proactive.top_k_tail={tail}"

        def tail_check(key: str = key) -> None:
            check_views(key, "proactive.top_k=4", "proactive.kl_weight=1")

        yield Case(key, "stated objective", "proactive.top_k=4", tail_check)
    yield Case(component, "zero at equality", "all read", all_read)
    yield Case(component, "limits", "proactive.kl_weight=0", kl_weight_0)
