"""The keys of on-policy distillation: what the teacher's opinion of a token is turned into."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.components import TOKEN_REWARDS
from recipes.schema.common import Config, RewardConfig
from recipes.schema.keys import key


@dataclass(frozen=True)
class TeacherConfig:
    path: str = key("stories-teacher", "Teacher, named as model.path is; of the same vocabulary.")
    trust_remote_code: bool = key(
        False, "The same as model.trust_remote_code, for the teacher's own code."
    )
    dtype: str = key(
        "float32",
        "Type of the teacher's weights and computation.",
        choices=("float32", "bfloat16", "float16"),
    )


@dataclass(frozen=True)
class DistillationRewardConfig(RewardConfig):
    token: str = key(
        "power",
        "Reward of a sampled token, of the teacher's probability p and the student's q. power: "
        "p^alpha - q^alpha. log_ratio: log p - log q. clip, tanh: bounded log-ratios. zscore: the "
        "log-ratio standardised over the step's tokens.",
        component=TOKEN_REWARDS,
    )
    alpha: float = key(5.0, "Exponent of the power reward.", above=0)
    normalization: str = key(
        "none",
        "Scale of the power reward. none: as it is. box_cox: divided by alpha.",
        choices=("none", "box_cox"),
    )
    clip: float = key(1.0, "Bound of the clip reward, nats.", above=0)
    tanh_scale: float = key(5.0, "Scale of the tanh reward, nats: tanh(log-ratio / it).", above=0)
    terminal_stop: str = key(
        "mask",
        "What the stop token that ends a completion counts as. raw: as any token. mask: it does "
        "not count. relabel: both models score the teacher's stop token. cross_eos: the teacher "
        "alone scores its own.",
        choices=("raw", "mask", "relabel", "cross_eos"),
    )


@dataclass(frozen=True)
class DivergenceConfig:
    jsd_beta: float = key(
        0.5, "Weight of the teacher in the mixture of objective=jsd.", above=0, below=1
    )
    top_k: int = key(100, "Number of tokens that objective=topk compares.", at_least=1)
    top_k_support: str = key(
        "teacher", "Model whose most likely tokens are compared.", choices=("teacher", "student")
    )
    top_k_tail: str = key(
        "renormalize",
        "What the other tokens are. renormalize: left out. bucket: one token together.",
        choices=("renormalize", "bucket"),
    )
    top_k_direction: str = key(
        "reverse_kl",
        "Divergence of objective=topk.",
        choices=("reverse_kl", "forward_kl"),
    )


@dataclass(frozen=True)
class Distillation(Config):
    """The config of a run with a teacher."""

    objective: str = key(
        "policy_gradient",
        "Loss. policy_gradient: sampled tokens weighted by reward.token. The others compare the "
        "whole distributions of student and teacher, topk on some tokens; power_full is the power "
        "reward's expectation.",
        choices=("policy_gradient", "reverse_kl", "forward_kl", "jsd", "topk", "power_full"),
    )
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    reward: DistillationRewardConfig = field(default_factory=DistillationRewardConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
