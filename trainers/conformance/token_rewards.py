"""Token rewards: the numbers that a reward gives, and the gradient that a run makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from recipes.components import TOKEN_REWARDS
from trainers.conformance import stated
from trainers.conformance.generic import Method
from trainers.conformance.report import SINGLE, Case, agree, require
from trainers.conformance.subjects import Setup, composed
from trainers.conformance.world import PROMPTS, tree
from trainers.opd import EPSILON

# Log-probs in nats, from certain to hardly possible.
LEVELS = (0.0, -1e-9, -1e-3, -0.1, -0.7, -2.0, -9.0, -40.0, -200.0, -1e4)


def method(*overrides: str, component: str = "", averages: bool = False) -> Method:
    """On-policy distillation with these keys; the last stop token counts as any other."""
    keys = ("recipe=opd", "reward.terminal_stop=raw", *overrides)
    return Method(keys, component=component, averages=averages)


class Reward:
    """The checks of a token reward.

    Args:
        name: a value of `reward.token`.
        overrides: the reward's other keys.
        bound: the largest size that it may have; None: the attribute `bound` of the reward.
        divergence: what it minimises; None: the attribute `minimises` of the reward, if it has one.
        signed: it is positive only where the teacher likes the token more.
    """

    def __init__(
        self,
        name: str,
        *overrides: str,
        bound: float | None = None,
        divergence: stated.Divergence | None = None,
        signed: bool = True,
    ):
        self.component, self.setting = f"reward.token={name}", " ".join(overrides)
        self.keys = (self.component, *overrides)
        config = composed(("recipe=opd", *self.keys))
        self.reward = TOKEN_REWARDS.resolve(name)(config.reward)
        self.bound = getattr(self.reward, "bound", None) if bound is None else bound
        self.divergence = divergence or named(getattr(self.reward, "minimises", None))
        self.signed = signed
        self.method = method(
            *self.keys, component=self.component, averages=bool(self.reward.window)
        )

    def case(self, name: str, check: Callable[[], None]) -> Case:
        return Case(self.component, name, self.setting, check)

    def cases(self) -> Iterator[Case]:
        """All checks that fit the reward."""
        yield self.case("shape and type", self.shape)
        yield self.case("finite", self.finite)
        yield self.case("zero at equality", self.zero)
        yield self.case("depends on the action", self.depends)
        if self.signed:
            yield self.case("sign", self.sign)
        if self.bound is not None:
            yield self.case("bounds", self.bounds)
        if not self.reward.window:
            yield self.case("each token by itself", self.tokenwise)
        yield self.case("expected gradient", self.expected_of_call)
        if self.divergence is not None:
            yield self.case("stated objective", self.expected_of_divergence)

    def of_pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher's and student's log-probs of all pairs of levels, and their rewards."""
        pairs = torch.tensor(list(itertools.product(LEVELS, repeat=2)), dtype=torch.float64)
        teacher, student = pairs.T.contiguous()
        return teacher, student, self.reward(teacher, student)

    def shape(self) -> None:
        for dtype in (torch.float32, torch.float64):
            teacher = torch.tensor(LEVELS, dtype=dtype)
            student = teacher.flip(0).requires_grad_()
            before = teacher.clone(), student.detach().clone()
            rewards = self.reward(teacher, student)
            require(
                rewards.shape == teacher.shape, f"shape {tuple(rewards.shape)} of [T] log-probs"
            )
            require(rewards.is_floating_point(), f"rewards are {rewards.dtype}")
            same = torch.equal(before[0], teacher) and torch.equal(before[1], student.detach())
            require(same, "the call changes its arguments")

    def finite(self) -> None:
        teacher, student, rewards = self.of_pairs()
        at = int((~rewards.isfinite()).int().argmax())
        pair = f"lp = {float(teacher[at])}, lq = {float(student[at])}"
        require(bool(rewards.isfinite().all()), f"reward {float(rewards[at])} where {pair}")
        gone = torch.full((1,), -torch.inf, dtype=torch.float64)
        require(not self.reward(gone, gone).isnan().any(), "NaN where both log-probs are -inf")

    def zero(self) -> None:
        levels = torch.tensor(LEVELS, dtype=torch.float64)
        size = float(self.reward(levels, levels).abs().max())
        require(size == 0, f"a reward of {size:.3g} where teacher and student agree")

    def sign(self) -> None:
        teacher, student, rewards = self.of_pairs()
        gap = teacher - student
        wrong = rewards * gap < 0
        at = int(wrong.int().argmax())
        said = f"reward {float(rewards[at]):.4g} where lp - lq = {float(gap[at]):.4g}"
        require(not bool(wrong.any()), said)
        require(bool(rewards.any()), "every reward is 0")

    def bounds(self) -> None:
        size = float(self.of_pairs()[2].abs().max())
        require(size <= self.bound * (1 + 1e-12), f"a reward of {size:.6g}, above {self.bound}")

    def table(self, setup: Setup) -> Tensor:
        """The reward of each token at each prefix, [P, V]."""
        exact = setup.exact()
        rewards = self.reward(exact.teacher.flatten(), exact.student.detach().flatten())
        return rewards.view_as(exact.teacher)

    def depends(self) -> None:
        rewards = self.table(self.method.single())
        spread = float((rewards.amax(-1) - rewards.amin(-1)).max())
        require(
            spread > 1e-9,
            "the reward is the same for every token of a place, so its expected gradient is 0",
        )

    def tokenwise(self) -> None:
        teacher, student, rewards = self.of_pairs()
        order = torch.randperm(len(teacher), generator=torch.Generator().manual_seed(0))
        few = order[: len(order) // 3]
        agree(self.reward(teacher[few], student[few]), rewards[few], what="reward among others")

    def expected_of_call(self) -> None:
        """What the run makes of the reward is what its call says, and it is not 0."""
        if self.reward.window:
            setup = Setup(self.method.overrides, samples=2, limit=2)
            # The standardised rewards are float32 annotations.
            agree(setup.expected(), expected_of_window(self.reward, setup), SINGLE)
            return
        setup = self.method.single()
        expected = setup.exact().of_rewards(self.table(setup))
        require(float(expected.norm()) > 0, "the expected gradient is 0")
        agree(setup.expected(), expected)

    def expected_of_divergence(self) -> None:
        setup = self.method.single()
        agree(setup.expected(), setup.exact().of_divergence(self.divergence))


def named(name: Any) -> stated.Divergence | None:
    """What a component says that it minimises: a function, or a name of `stated.NAMES`."""
    return stated.NAMES[name] if isinstance(name, str) else name


def expected_of_window(reward, setup: Setup) -> Tensor:
    """The expected gradient of rewards that are standardised over the tokens of two completions."""
    nodes, exact = tree(setup.limit), setup.exact()
    student = nodes.log_probs(setup.policy, PROMPTS[0])
    loss = torch.zeros((), dtype=torch.float64)
    for pair in itertools.product(nodes.completions, repeat=2):
        places = [place for one in pair for place in one.places]
        ids = [token for one in pair for token in one.ids]
        taught, scored = exact.teacher[places, ids], student[places, ids]
        values = reward(taught, scored.detach())
        values = (values - values.mean()) / (values.std(correction=0) + EPSILON)
        loss = loss - scored.sum().detach().exp() * (values * scored).sum()
    return setup.policy.gradient_of(loss)


def limit_case(
    component: str, setting: str, near: tuple[str, ...], limit: stated.Divergence, scale: float
) -> Case:
    """A key near the end of its range: the gradient, times `scale`, is that of the limit."""

    def check() -> None:
        setup = method(*near).single()
        agree(scale * setup.expected(), setup.exact().of_divergence(limit), 1e-4)

    return Case(component, "limits", setting, check)


def cases() -> Iterator[Case]:
    """Of the rewards that come with the project."""
    for alpha, normalization in ((0.5, "none"), (1, "none"), (5, "none"), (2, "box_cox")):
        box_cox = normalization == "box_cox"
        reward = Reward(
            "power",
            f"reward.alpha={alpha}",
            f"reward.normalization={normalization}",
            bound=1 / alpha if box_cox else 1.0,
            divergence=stated.power(alpha, box_cox),
        )
        yield from reward.cases()
        # What a config selects by itself is a component too.
        yield Case(
            f"reward.normalization={normalization}",
            "stated objective",
            f"reward.alpha={alpha}",
            reward.expected_of_divergence,
        )
    yield Case("reward.token=power", "values", "p = 0.9, q = 0.5", power_values)
    yield from Reward("log_ratio", divergence=stated.reverse_kl).cases()
    clipped = stated.clipped_log_ratio(0.5)
    yield from Reward("clip", "reward.clip=0.5", bound=0.5, divergence=clipped).cases()
    bent = stated.tanh_of_log_ratio(2)
    yield from Reward("tanh", "reward.tanh_scale=2", bound=1.0, divergence=bent).cases()
    distance = stated.total_variation(0.5)
    yield from Reward("sign", "reward.sign_scale=0.5", bound=0.5, divergence=distance).cases()
    # Before it is standardised it is the log-ratio.
    yield from Reward("zscore").cases()
    for name in ("power", "log_ratio", "clip", "tanh", "sign"):
        yield from method(f"reward.token={name}", component=f"reward.token={name}").cases()
    zscore = method("reward.token=zscore", component="reward.token=zscore", averages=True)
    yield from zscore.cases()
    score = "reward.select.score=dial"
    yield from method(score, component=score, averages=True).cases()
    yield from limits()


def limits() -> Iterator[Case]:
    """Each reward at the ends of its keys."""
    power, box_cox = "reward.token=power", "reward.normalization=box_cox"
    yield limit_case(
        power, "alpha -> 0", (power, "reward.alpha=1e-6", box_cox), stated.reverse_kl, 1
    )
    yield limit_case(power, "alpha = 1", (power, "reward.alpha=1"), stated.half_squares, 1)
    clip, tanh = "reward.token=clip", "reward.token=tanh"
    yield limit_case(clip, "clip -> inf", (clip, "reward.clip=1e6"), stated.reverse_kl, 1)
    wide = (tanh, "reward.tanh_scale=1e4")
    yield limit_case(tanh, "tanh_scale -> inf", wide, stated.reverse_kl, 1e4)


def power_values() -> None:
    """The test values of the specification, 1.1."""
    logs = torch.tensor([0.9, 0.5], dtype=torch.float64).log()[:, None]
    for alpha, value in ((1, 0.4), (5, 0.55924), (10, 0.34770), (50, 5.15e-3)):
        keys = ("recipe=opd", f"reward.alpha={alpha}")
        reward = TOKEN_REWARDS.resolve("power")(composed(keys).reward)
        agree(reward(*logs), torch.tensor([value], dtype=torch.float64), 1e-3, f"alpha = {alpha}")
