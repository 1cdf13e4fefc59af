"""The keys of on-policy SFT: samples that are not the policy's own."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.schema.common import Config, RolloutConfig
from recipes.schema.keys import key
from recipes.schema.rewards import SequenceRewardConfig


@dataclass(frozen=True)
class OnPolicyRolloutConfig(RolloutConfig):
    fixed_steps: int | None = key(
        None,
        "Number of steps that the starting model samples for, and whose samples are then used "
        "again and again. null: each step has samples of its own.",
        at_least=1,
    )


@dataclass(frozen=True)
class OnPolicySft(Config):
    """The config of an on-policy SFT run."""

    allow_biased_sampling: bool = key(
        False, "Accept a temperature, top_p or top_k that samples from another distribution."
    )
    keep_above: float = key(
        0.0, "Reward above which a sample is kept, if it ended by itself within the limit."
    )
    rollout: OnPolicyRolloutConfig = field(default_factory=OnPolicyRolloutConfig)
    reward: SequenceRewardConfig = field(default_factory=SequenceRewardConfig)
