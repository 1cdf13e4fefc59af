"""Checks of a component from outside: what must hold whatever it states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from recipes.components import ENGINES, TOKEN_REWARDS, TRAINERS, VERIFIERS
from recipes.errors import ConfigError
from trainers.conformance.engines import of_engine
from trainers.conformance.generic import Method
from trainers.conformance.report import SINGLE, Case, agree, require
from trainers.conformance.stated import reverse_kl
from trainers.conformance.subjects import Setup, composed, verify
from trainers.conformance.token_rewards import Reward, named
from trainers.conformance.verifiers import of_verifier
from trainers.conformance.world import PROMPTS, STOP, TEXTS, tree

REGISTRIES = {registry.key: registry for registry in (TOKEN_REWARDS, TRAINERS, VERIFIERS, ENGINES)}


class Outside(Method):
    """A trainer from outside, on pairs of completions of one prompt."""

    def __init__(self, overrides: Sequence[str], component: str):
        super().__init__(overrides, samples=2, component=component)

    def cases(self, setting: str = "") -> Iterator[Case]:
        yield from super().cases(setting)
        method = self.single().run.method
        yield Case(self.component, "depends on the action", setting, self.not_zero)
        if method.distills:
            yield Case(self.component, "sign", setting, self.towards_teacher)
        if method.verifies:
            yield Case(self.component, "sign", setting, self.towards_score)
        if getattr(method, "minimises", None) is not None:
            yield Case(self.component, "stated objective", setting, self.of_stated)

    def expected(self) -> tuple[Setup, torch.Tensor]:
        setup = self.single()
        return setup, setup.expected()

    def not_zero(self) -> None:
        setup, expected = self.expected()
        scale = float(setup.exact().of_divergence(reverse_kl).norm())
        require(
            float(expected.norm()) > SINGLE * scale,
            "the expected gradient is 0: the loss does not depend on the sampled token, or it is a "
            "sampled estimate that was differentiated",
        )

    def towards_teacher(self) -> None:
        """The expected gradient has a positive part along the reverse KL's."""
        setup, expected = self.expected()
        share = part_along(expected, setup.exact().of_divergence(reverse_kl))
        require(
            share > SINGLE,
            f"the update does not move towards the teacher: {share:.3g} of the gradient of the "
            "reverse KL is in it",
        )

    def towards_score(self) -> None:
        """The expected update has a positive part along the gradient of the expected score."""
        setup, expected = self.expected()
        nodes = tree(setup.limit)
        table = nodes.log_probs(setup.policy, PROMPTS[0])
        score = torch.zeros((), dtype=torch.float64)
        for one in nodes.completions:
            text = "".join(TEXTS[token] for token in one.ids if token != STOP)
            score = score + nodes.log_prob(table, one).exp() * verify(text, "7")
        share = part_along(expected, setup.policy.gradient_of(-score))
        require(
            share > SINGLE,
            f"the update does not raise the score: {share:.3g} of its gradient is in it",
        )

    def of_stated(self) -> None:
        """The gradient is that of what the trainer's `minimises` says."""
        setup, expected = self.expected()
        divergence = named(setup.run.method.minimises)
        agree(expected / self.samples, setup.exact().of_divergence(divergence))


def part_along(ours: torch.Tensor, other: torch.Tensor) -> float:
    """The length of the part of a flat tensor along another, relative to the other's."""
    return float(ours @ other / other.square().sum())


def plain_stops(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides, with a last stop token that counts as any other where the key is read.

    What a loss minimises over all tokens is only then what is enumerated.
    """
    raw = ("reward.terminal_stop=raw", *overrides)
    try:
        composed(raw)
    except ConfigError:
        return tuple(overrides)
    return raw


def cases(key: str, name: str, overrides: Sequence[str]) -> Iterator[Case]:
    """The checks of one component.

    Args:
        key: `reward.token`, `trainer`, `reward.verifier` or `rollout.engine`.
        name: its dotted path.
        overrides: other keys of the config.

    Raises:
        ConfigError: it cannot be imported.
    """
    REGISTRIES[key].resolve(name)
    if key == "reward.token":
        reward = Reward(name, *overrides)
        yield from reward.cases()
        # Equality is checked on the numbers and on the gradient.
        yield from reward.method.cases(" ".join(overrides))
    elif key == "reward.verifier":
        yield from of_verifier(name)
    elif key == "rollout.engine":
        yield from of_engine(name)
    else:
        keys = plain_stops((*overrides, f"trainer={name}"))
        yield from Outside(keys, f"trainer={name}").cases()
