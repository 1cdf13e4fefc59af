"""GRPO: advantages of a group, the clipped ratio, the KL to a reference, truncation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from rewards.groups import EPSILON
from trainers.conformance.generic import Method
from trainers.conformance.report import SINGLE, Case, agree, require, vanish
from trainers.conformance.subjects import Setup, verify
from trainers.conformance.world import PROMPTS, TEXTS, TinyPolicy, tree
from trainers.losses import Loss

KEYS = ("recipe=grpo", "grpo.kl_beta=0", "grpo.gamma=0.5", "train.minibatches=1")
# What changes the weights between the samples and the update.
STEP = 0.15
# With adapters, the reference is the policy without them, and no second model is loaded.
REFERENCE = "model.lora.rank=1"


def grpo(*overrides: str, **options) -> Setup:
    """Pairs of completions of one prompt."""
    return Setup((*KEYS, *overrides), samples=2, limit=2, **options)


def cases() -> Iterator[Case]:
    """Of `trainer=grpo`, its keys, and the objectives of the policy-gradient loss."""
    component = "trainer=grpo"
    yield from Method(KEYS, samples=2, component=component).cases()
    rows: list[tuple[str, str, str, Callable[[], None]]] = [
        (component, "stated objective", "grpo.normalize_std=false", dr_grpo),
        (component, "expected gradient", "grpo.normalize_std=true", by_pairs),
        (component, "expected gradient", "grpo.truncated=zero_reward", cut_have_no_reward),
        ("grpo.truncated=as_is", "expected gradient", "", by_pairs),
        ("grpo.truncated=zero_reward", "expected gradient", "", cut_have_no_reward),
        ("grpo.truncated=mask", "expected gradient", "", cut_are_left_out),
        (component, "zero at equality", "equal rewards", equal_rewards),
        (component, "limits", "grpo.gamma=0", gamma_0),
        (component, "stated objective", "grpo.kl_beta=0.3: forward KL", reference_kl),
        (component, "limits", "grpo.kl_beta=0", no_kl),
        (component, "stated objective", "importance_cap=1.3", importance_weight),
    ]
    for component, name, setting, check in rows:
        yield Case(component, name, setting, check)
    for objective in ("reinforce", "ppo_clip", "cispo"):

        def clipped(objective: str = objective) -> None:
            surrogate(objective)

        yield Case(
            f"loss.objective={objective}", "stated objective", "another policy sampled", clipped
        )


def reward_of(ids: tuple[int, ...], limit: int, gamma: float = 0.5) -> float:
    """Accuracy plus gamma times the length reward (specification, 4.1)."""
    text = "".join(TEXTS[token] for token in ids if token)
    return verify(text, "7") * (1 + gamma * (1 - len(ids) / limit))


def of_pairs(setup: Setup, advantages: Callable[[np.ndarray, tuple], np.ndarray]) -> Tensor:
    """The expected gradient of - sum A log q over all pairs of completions."""
    nodes = tree(setup.limit)
    table = nodes.log_probs(setup.policy, PROMPTS[0])
    loss = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(nodes.completions, repeat=2):
        rewards = np.array([reward_of(one.ids, setup.limit) for one in pair])
        logs = torch.stack([nodes.log_prob(table, one) for one in pair])
        given = torch.from_numpy(advantages(rewards, pair))
        loss = loss - logs.sum().detach().exp() * (given * logs).sum()
    return setup.policy.gradient_of(loss)


def relative(rewards: np.ndarray, pair: tuple = ()) -> np.ndarray:
    """(R - mean) / (std + 1e-6) of a pair, 0 where both are equal."""
    half = (rewards[0] - rewards[1]) / 2
    return np.array([half, -half]) / (abs(half) + EPSILON)


def dr_grpo() -> None:
    """Of n samples the expected sum is (n - 1) times the gradient of the expected reward."""
    setup = grpo("grpo.normalize_std=false")
    nodes = tree(setup.limit)
    table = nodes.log_probs(setup.policy, PROMPTS[0])
    reward = sum(
        nodes.log_prob(table, one).exp() * reward_of(one.ids, setup.limit)
        for one in nodes.completions
    )
    agree(setup.expected(), setup.policy.gradient_of(-reward), SINGLE)


def by_pairs() -> None:
    setup = grpo()
    agree(setup.expected(), of_pairs(setup, relative), SINGLE)


def cut_have_no_reward() -> None:
    def advantages(rewards: np.ndarray, pair: tuple) -> np.ndarray:
        ended = [one.finish_reason == "stop" for one in pair]
        return relative(rewards * ended)

    setup = grpo("grpo.truncated=zero_reward")
    agree(setup.expected(), of_pairs(setup, advantages), SINGLE)


def cut_are_left_out() -> None:
    """They count in the group's mean, and not in the loss."""

    def advantages(rewards: np.ndarray, pair: tuple) -> np.ndarray:
        return relative(rewards) * [one.finish_reason == "stop" for one in pair]

    setup = grpo("grpo.truncated=mask")
    agree(setup.expected(), of_pairs(setup, advantages), SINGLE)


def equal_rewards() -> None:
    """A group without a difference teaches nothing, to the bit."""
    setup = grpo()
    same = tree(setup.limit).completions[4]
    vanish(setup.update(setup.draw([same, same])).gradient, 1.0, 0)


def gamma_0() -> None:
    """Without the length reward, two right completions of other lengths are equal."""
    right = [one for one in tree(2).completions if 1 in one.ids]
    pair = next(p for p in itertools.combinations(right, 2) if p[0].ids != p[1].ids)
    setup = grpo("grpo.gamma=0")
    vanish(setup.update(setup.draw(pair)).gradient, 1.0, 0)


def reference_kl() -> None:
    """The added gradient is beta times that of the *forward* KL, as GRPO's estimate has it."""
    setup = grpo("grpo.kl_beta=0.3", REFERENCE)
    without = grpo()
    exact = setup.exact()
    with torch.no_grad():
        reference = tree(setup.limit).log_probs(setup.reference, PROMPTS[0])
    kl = (reference.exp() * (reference - exact.student)).sum(-1)
    # Both completions of a pair count.
    expected = 0.3 * 2 * setup.policy.gradient_of((exact.reach * kl).sum())
    agree(setup.expected() - without.expected(), expected, SINGLE)


def no_kl() -> None:
    """A tiny weight is near none, and the reference itself adds nothing."""
    near, without = grpo("grpo.kl_beta=1e-9", REFERENCE), grpo()
    plain = without.expected()
    agree(near.expected(), plain, 1e-5)
    itself = grpo("grpo.kl_beta=5", REFERENCE)
    itself.reference = itself.policy
    agree(itself.expected(), plain, SINGLE)


def importance_weight() -> None:
    """Samples of another policy, weighed by min(q / s, cap)."""
    sampler = TinyPolicy(4)
    setup = grpo("grpo.importance_cap=1.3", sampler=sampler)
    nodes = tree(setup.limit)
    table = nodes.log_probs(setup.policy, PROMPTS[0])
    with torch.no_grad():
        drawn = nodes.log_probs(sampler, PROMPTS[0])
    weights = (table.detach() - drawn).exp().clamp(max=1.3)
    loss = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(nodes.completions, repeat=2):
        given = relative(np.array([reward_of(one.ids, setup.limit) for one in pair]))
        probability = sum(nodes.log_prob(drawn, one) for one in pair).exp()
        for one, advantage in zip(pair, given):
            at = list(one.places), list(one.ids)
            loss = loss - probability * advantage * (weights[at] * table[at]).sum()
    agree(setup.expected(sampler=sampler), setup.policy.gradient_of(loss), SINGLE)


def surrogate(objective: str) -> None:
    """The objectives of `trainers.losses.Loss` after the weights have moved.

    The old log-probs are those of the policy that sampled. Its samples weigh the surrogate.
    """
    keys = {"objective": objective}
    if objective != "reinforce":
        keys |= {"clip_low": 0.2, "clip_high": 0.3}
    old = TinyPolicy(1)
    setup = grpo("grpo.normalize_std=false", "train.minibatches=2", sampler=old)
    with torch.no_grad():
        for weight, noise in zip(setup.policy.parameters(), TinyPolicy(5).parameters()):
            weight += STEP * noise
    setup.loss = Loss(policy_gradient=True, objective=keys, vocab=setup.run.vocab)
    setup.run.score_policy = _scored_by(setup, old)
    nodes = tree(setup.limit)
    table = nodes.log_probs(setup.policy, PROMPTS[0])
    with torch.no_grad():
        before = nodes.log_probs(old, PROMPTS[0])
    ratio, loss, outside = (table - before).exp(), torch.zeros((), dtype=torch.float64), 0
    bounded = ratio.clamp(0.8, 1.3)
    for pair in itertools.product(nodes.completions, repeat=2):
        rewards = [reward_of(one.ids, setup.limit) for one in pair]
        probability = sum(nodes.log_prob(before, one) for one in pair).exp()
        for one, reward in zip(pair, rewards):
            at, advantage = (list(one.places), list(one.ids)), reward - sum(rewards) / 2
            outside += int((ratio[at] != bounded[at]).sum())
            gain = {
                "reinforce": table[at] * advantage,
                "ppo_clip": torch.minimum(ratio[at] * advantage, bounded[at] * advantage),
                "cispo": bounded[at].detach() * table[at] * advantage,
            }[objective]
            loss = loss - probability * gain.sum()
    require(outside > 0, "no ratio is outside the bounds, so the case shows nothing")
    agree(setup.expected(sampler=old), setup.policy.gradient_of(loss), SINGLE)


def _scored_by(setup: Setup, old: TinyPolicy) -> Callable[..., None]:
    """`score_policy` as it was before the weights moved."""

    def score(trajectories, name: str = "student_logprobs", adapters: bool = True) -> None:
        current, setup.policy = setup.policy, old
        setup.score_policy(trajectories, name, adapters)
        setup.policy = current

    return score
