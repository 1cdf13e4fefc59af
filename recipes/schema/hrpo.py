"""The keys of HRPO: rewards and advantages of the stages of a streaming reasoner."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.schema.common import Config
from recipes.schema.grpo import PolicyConfig
from recipes.schema.keys import key
from recipes.schema.rewards import SequenceRewardConfig


@dataclass(frozen=True)
class HrpoConfig:
    local_weight: float = key(
        0.5,
        "Lambda: weight of a stage's own advantage against the completion's. 0: GRPO.",
        at_least=0,
        at_most=1,
    )
    format_weight: float = key(0.2, "w: weight of the format in every reward.", at_least=0)
    streaming_weight: float = key(
        0.1, "Alpha: weight of the streaming thoughts' brevity.", at_least=0
    )
    deep_weight: float = key(
        1.0,
        "Beta: weight of the deep segment's brevity. The reader waits for that segment, so it "
        "should be above alpha.",
        at_least=0,
    )
    deep_credit: float = key(
        1.0,
        "c: share of the deep segment's reward that the thoughts before it have too.",
        at_least=0,
    )
    granularity: str = key(
        "stage",
        "What has an advantage of its own. stage: the thoughts and the deep segment. sentence: the "
        "thoughts after each sentence, and the deep segment. boundary_token: the tokens that end a "
        "thought or a segment.",
        choices=("stage", "sentence", "boundary_token"),
    )


@dataclass(frozen=True)
class Hrpo(Config):
    """The config of an HRPO run, without the streaming."""

    grpo: PolicyConfig = field(default_factory=PolicyConfig)
    hrpo: HrpoConfig = field(default_factory=HrpoConfig)
    reward: SequenceRewardConfig = field(default_factory=SequenceRewardConfig)
