"""What holds for every method, whatever it optimises."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from recipes.errors import ConfigError
from rollouts.engines.sampling import sample
from rollouts.trajectory import Trajectory
from trainers.conformance.report import (
    Case,
    Difference,
    agree,
    require,
    vanish,
)
from trainers.conformance.subjects import Setup
from trainers.conformance.world import PROMPTS, TinyPolicy, tree

# Completions of 1, 2 and 3 tokens, right and wrong ones, stopped and cut.
MIXED = (0, 1, 4, 5, 20, 39, 7, 12, 33)
# Uniform draws of each prefix, evenly spread, so a frequency is exact to one of them.
GRID = 1000


def mixed(setup: Setup) -> list[Trajectory]:
    """Nine trajectories: three of each of three prompts."""
    chosen = [tree(setup.limit).completions[place] for place in MIXED]
    return setup.draw(chosen[0:3], chosen[3:6], chosen[6:9])


class Method:
    """The checks of a method that samples plain completions.

    Args:
        overrides: of its config.
        samples: completions of a prompt in the checks that enumerate; 2 where they are compared.
        component: what the report calls it; None: `trainer=…` of the overrides.
        averages: a token's loss depends on the other tokens of the step, as in `zscore`.
    """

    # Its completions are plain ones, so all of them can be drawn.
    enumerates = True

    def __init__(
        self,
        overrides: Sequence[str],
        samples: int = 1,
        component: str = "",
        averages: bool = False,
    ):
        self.overrides = tuple(overrides)
        self.samples, self.component, self.averages = samples, component, averages

    def drawn(self, **options) -> tuple[Setup, list[Trajectory]]:
        """A set-up with trajectories: three prompts with three samples each."""
        setup = Setup(self.overrides, samples=3, prompts=3, **options)
        return setup, mixed(setup)

    def single(self, *overrides: str, **options) -> Setup:
        """One prompt with `samples` samples; pairs are of shorter completions."""
        limit = 3 if self.samples == 1 else 2
        return Setup((*self.overrides, *overrides), samples=self.samples, limit=limit, **options)

    def cases(self, setting: str = "") -> Iterator[Case]:
        checks = {
            "masked tokens": self.masked_tokens,
            "padding": self.padding,
            "packing order": self.packing_order,
            "micro-batch split": self.microbatch_split,
        }
        if self.enumerates:
            checks["sampler"] = self.sampler
        if not self.averages:
            checks["ranks"] = self.ranks
        if self.drawn()[0].run.method.distills:
            checks["zero at equality"] = self.zero_at_equality
            checks["shifted teacher"] = self.shifted_teacher
        for name, check in checks.items():
            yield Case(self.component, name, setting, check)

    def microbatch_split(self) -> None:
        """A budget of 6 tokens makes seven micro-batches of the nine trajectories."""
        setup, drawn = self.drawn()
        agree(setup.update(drawn, budget=6).gradient, setup.update(drawn).gradient)

    def packing_order(self) -> None:
        setup, drawn = self.drawn()
        agree(setup.update(drawn[::-1]).gradient, setup.update(drawn).gradient)

    def ranks(self) -> None:
        """Two ranks; and twelve, of which three have nothing and run a copy with weight 0."""
        setup, drawn = self.drawn()
        whole = setup.update(drawn).gradient
        for ranks in (2, 12):
            ours = setup.update(drawn, ranks=ranks, budget=9).gradient
            agree(ours, whole, what=f"gradient of {ranks} ranks")

    def padding(self) -> None:
        """A trajectory that stands in, beside the others and in a micro-batch of its own."""
        setup, drawn = self.drawn()
        whole = setup.update(drawn).gradient
        copied = copy.copy(drawn[-1].annotations)
        padded = [*drawn, replace(drawn[-1], padding=True, annotations=copied)]
        agree(setup.update(padded).gradient, whole)
        agree(setup.update(padded, budget=1).gradient, whole)

    def masked_tokens(self) -> None:
        """NaN at masked tokens changes nothing; what is masked and what is not add up."""
        setup, drawn = self.drawn()
        whole = setup.update(drawn)
        parts = []
        for kept in (0, 1):
            clean = setup.update(drawn, edit=_mask(kept, fill=False))
            agree(setup.update(drawn, edit=_mask(kept, fill=True)).gradient, clean.gradient)
            parts.append(clean)
        if self.averages:
            return
        total = sum(part.tokens * part.gradient for part in parts)
        require(
            sum(part.tokens for part in parts) == whole.tokens,
            "the tokens that count are not those of the mask",
        )
        agree(total, whole.tokens * whole.gradient, what="sum over the tokens")

    def zero_at_equality(self) -> None:
        """A teacher with the student's weights has nothing to say."""
        usual, drawn = self.drawn()
        scale = float(usual.update(drawn).gradient.norm())
        require(scale > 0, "the gradient is 0 whatever the teacher says")
        same, drawn = self.drawn(teacher=TinyPolicy(1))
        vanish(same.update(drawn).gradient, scale, what="gradient where teacher = student")

    def shifted_teacher(self) -> None:
        """A teacher that is shifted by one token is not zero where it must be, and is noticed."""
        usual, drawn = self.drawn()
        scale = float(usual.update(drawn).gradient.norm())
        shifted, drawn = self.drawn(teacher=TinyPolicy(1), shift=1)
        require(
            float(shifted.update(drawn).gradient.norm()) > 1e-3 * scale,
            "a teacher shifted by one token changes nothing",
        )

    def sampler(self) -> None:
        """The probabilities that the sampler draws with are those of the trainer's log-probs."""
        try:
            setup = self.single("rollout.temperature=0.7")
        except ConfigError:
            # The method refuses another temperature.
            setup = self.single()
        check_sampler(setup)


def _mask(kept: int, fill: bool):
    """Mask every other token; `fill` puts NaN there."""

    def edit(trajectory: Trajectory) -> None:
        annotations = trajectory.annotations
        count = len(trajectory.completion_ids)
        places = np.arange(count) + trajectory.prompt_index + trajectory.sample_index
        out = places % 2 != kept
        annotations["mask"] = annotations["mask"] & ~out
        for name, values in annotations.items():
            if fill and values.dtype.kind == "f":
                changed = values.copy()
                changed[out] = np.nan
                annotations[name] = changed

    return edit


def check_sampler(setup: Setup) -> None:
    """Compare the sampler's frequencies with the log-probs that the loss returns.

    Raises:
        Difference: the largest gap of a probability is above what the grid of draws allows.
    """
    nodes = tree(setup.limit)
    trainer = torch.full((len(nodes.prefixes), setup.policy.vocab), torch.nan, dtype=torch.float64)
    for group in _groups(nodes.completions, setup.samples):
        for trajectory, output in setup.update(setup.draw(group)).outputs:
            if "logprobs" not in output:
                raise Difference("the loss returns no `logprobs`, so nothing shows what it scored")
            places = nodes.completions[_index(nodes, trajectory)].places
            mask = trajectory.annotations["mask"]
            for place, token, logprob, counts in zip(
                places, trajectory.completion_ids, output["logprobs"], mask
            ):
                if counts:
                    trainer[place, token] = float(np.exp(logprob))
    sampled = frequencies(setup)
    gap = (trainer - sampled).abs().nan_to_num()
    place, token = divmod(int(gap.argmax()), trainer.shape[1])
    drawn, scored = float(sampled[place, token]), float(trainer[place, token])
    require(
        float(gap.max()) <= 2 / GRID,
        f"the sampler draws token {token} after {list(nodes.prefixes[place])} with probability "
        f"{drawn:.4f}, the trainer scores it {scored:.4f}",
    )


def _groups(completions: Sequence, samples: int) -> Iterator[Sequence]:
    """Every completion, in groups of `samples`; some come twice where they do not go up."""
    for start in range(0, len(completions), samples):
        last = min(start, len(completions) - samples)
        yield completions[last : last + samples]


def _index(nodes, trajectory: Trajectory) -> int:
    ids = tuple(trajectory.completion_ids)
    return next(index for index, one in enumerate(nodes.completions) if one.ids == ids)


def frequencies(setup: Setup) -> Tensor:
    """How often the sampler draws each token after each prefix, [P, V]."""
    nodes, sampling = tree(setup.limit), setup.engine.sampling
    uniforms = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    rows = []
    for prefix in nodes.prefixes:
        with torch.no_grad():
            policy, ids = setup.engine.policy, [*PROMPTS[0], *prefix]
            logits = policy.logits(ids).float().expand(GRID, -1)
        drawn, _ = sample(logits, uniforms, sampling)
        rows.append(torch.bincount(drawn, minlength=policy.vocab) / GRID)
    return torch.stack(rows).double()
