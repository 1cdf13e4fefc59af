"""The keys of GRPO: advantages within groups of completions, and PPO's clipped loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.schema.common import Config
from recipes.schema.keys import key
from recipes.schema.rewards import SequenceRewardConfig


@dataclass(frozen=True)
class PolicyConfig:
    """What the methods with GRPO's loss share."""

    normalize_std: bool = key(
        True,
        "Divide a group's advantages by their standard deviation. false: Dr. GRPO.",
    )
    kl_beta: float = key(
        0.001,
        "Weight of the KL to the starting weights. 0: no reference model is loaded.",
        at_least=0,
    )
    truncated: str = key(
        "as_is",
        "Completions cut at the limit of new tokens. as_is: their reward is that of their text. "
        "zero_reward: their reward is 0. mask: the update leaves them out, though their reward "
        "counts in their group's mean.",
        choices=("as_is", "zero_reward", "mask"),
    )
    clip_low: float = key(
        0.2, "Distance of the ratio's lower bound from 1 in PPO's clip.", at_least=0, at_most=1
    )
    clip_high: float = key(
        0.2, "Distance of the ratio's upper bound from 1 in PPO's clip.", at_least=0
    )
    importance_cap: float | None = key(
        None,
        "Largest weight of a token, by the trainer's probability of it over the sampler's, before "
        "the updates. null: no token is weighted.",
        above=0,
    )


@dataclass(frozen=True)
class GrpoConfig(PolicyConfig):
    gamma: float = key(0.5, "Weight of the length reward beside accuracy.", at_least=0)


@dataclass(frozen=True)
class Grpo(Config):
    """The config of a GRPO run."""

    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    reward: SequenceRewardConfig = field(default_factory=SequenceRewardConfig)
