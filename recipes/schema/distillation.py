"""The keys of on-policy distillation: what the teacher's opinion of a token is turned into."""

from __future__ import annotations

from dataclasses import dataclass, field

from recipes.components import TOKEN_REWARDS, TOKEN_SCORES
from recipes.schema.common import Config
from recipes.schema.keys import REQUIRED, key
from recipes.schema.rewards import SequenceRewardConfig


@dataclass(frozen=True)
class TeacherConfig:
    path: str = key(
        "stories-teacher",
        "Teacher, named as model.path is; of the same vocabulary but for tokenizer=own. self: the "
        "student.",
    )
    tokenizer: str = key(
        "shared",
        "Tokens in which the teacher reads and scores. shared: the student's, so both must have "
        "one vocabulary. own: its own, in which the same text is aligned with the student's.",
        choices=("shared", "own"),
    )
    url: str | None = key(
        None,
        "Addresses of vLLM servers that score in place of a teacher in this process, as "
        "http://HOST:8000/v1, with commas between them. path then names the model that they serve, "
        "of which only tokenizer and config are read. null: in this process.",
    )
    engine: str = key(
        "hf",
        "What runs a teacher without url. hf: transformers, in this process. vllm: vLLM, in a "
        "process beside this one, on the same device. It serves log-probs of sampled tokens alone, "
        "and sleeps between uses on a GPU.",
        choices=("hf", "vllm"),
    )
    rest: bool = key(
        False,
        "Keep the weights of engine=hf on the CPU between uses. Several teachers in this process "
        "do so in any case. On a CPU nothing changes.",
    )
    gpu_memory_utilization: float = key(
        0.3, "Share of a GPU's memory that engine=vllm takes.", above=0, at_most=1
    )
    cpu_kv_cache_gib: float = key(
        1.0, "Size of the KV cache of engine=vllm on a CPU, GiB.", above=0
    )
    concurrency: int = key(
        16, "Number of requests that a rank has open at the servers of url.", at_least=1
    )
    request_seconds: float = key(
        300.0, "Seconds that a server of url may take for an answer.", above=0
    )
    retry_seconds: float = key(
        600.0,
        "Seconds for which a request that a server of url did not answer is made again. Then the "
        "run ends.",
        at_least=0,
    )
    weights: str = key(
        "frozen",
        "Weights of a student that teaches itself. frozen: those it starts from. current: those of "
        "the step. base: those without LoRA's adapters. The last two need no second model.",
        choices=("frozen", "current", "base"),
    )
    prompt: str | None = key(
        None,
        "Last turn of the prompt that the teacher reads in place of the student's. {prompt}, "
        "{solution} and {answer} stand for the row's. null: the student's own.",
    )
    prompt_column: str | None = key(
        None,
        "Column of the prompt that the teacher reads, a text or chat turns, with the same fields.",
    )
    skip_tokens: int = key(
        0, "Number of tokens of each completion, from the first, that do not learn.", at_least=0
    )
    trust_remote_code: bool = key(
        False, "The same as model.trust_remote_code, for the teacher's own code."
    )
    dtype: str = key(
        "float32",
        "Type of the teacher's weights and computation. With url, the servers' own.",
        choices=("float32", "bfloat16", "float16"),
    )

    route: str | None = key(
        None,
        "Column that names the teacher of each row, where `teachers` has several. null: all of "
        "them score every row.",
    )
    average: str = key(
        "rewards",
        "Weighted mean of several teachers that all score a row. rewards: of their token rewards. "
        "probabilities: of their probabilities of the token.",
        choices=("rewards", "probabilities"),
    )


@dataclass(frozen=True)
class NamedTeacherConfig:
    """A teacher of several. What it leaves out (null) is as in the section `teacher`."""

    path: str = key(REQUIRED, "A teacher in place of teacher.path. NAME is any name.")
    url: str | None = key(None, "Its servers. null: those of teacher.url, if there are any.")
    engine: str | None = key(
        None, "What runs it. null: as teacher.engine says.", choices=("hf", "vllm")
    )
    weight: float = key(
        1.0, "Its weight in the mean over all teachers, which divides by their sum.", above=0
    )
    dtype: str | None = key(
        None,
        "Its type. null: that of teacher.dtype.",
        choices=("float32", "bfloat16", "float16"),
    )
    trust_remote_code: bool | None = key(
        None, "The same as teacher.trust_remote_code, for it alone. null: as that says."
    )


@dataclass(frozen=True)
class SelectConfig:
    score: str | None = key(
        None,
        "Score of a response's tokens, of which the highest alone learn. null: all learn. dial: "
        "|log p - log q|^(1 - beta) * |p - q|^beta (DIAL-OPD).",
        component=TOKEN_SCORES,
    )
    keep: float = key(
        0.4, "Share of a response's tokens that learn, one at least.", above=0, at_most=1
    )
    beta: float = key(
        1.0,
        "Exponent of the dial score. 0 selects by the log-ratio, 1 by the difference of the "
        "probabilities.",
        at_least=0,
    )


@dataclass(frozen=True)
class DistillationRewardConfig(SequenceRewardConfig):
    token: str = key(
        "power",
        "Reward of a sampled token, of the teacher's probability p and the student's q. power: "
        "p^alpha - q^alpha. log_ratio: log p - log q. clip, tanh: bounded log-ratios. zscore: the "
        "log-ratio standardised over the step's tokens. sign: the log-ratio's sign (TV-OPD).",
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
    sign_scale: float = key(1.0, "Size of the sign reward.", above=0)
    teacher_weight: float = key(1.0, "Weight of the token reward.", at_least=0)
    task_weight: float = key(
        0.0,
        "Weight of the verifier's score beside the token reward: of a completion's advantage over "
        "the other samples of its prompt, as in GRPO. Above 0, rollout.samples_per_prompt must be "
        "2 or more.",
        at_least=0,
    )
    task_normalize_std: bool = key(
        True, "Divide that advantage by the standard deviation of its prompt's scores."
    )
    select: SelectConfig = field(default_factory=SelectConfig)
    importance_cap: float | None = key(
        None,
        "Largest weight of a token, by the trainer's probability of it over the sampler's. For "
        "objective=policy_gradient. null: no token is weighted.",
        above=0,
    )
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
    # By their names.
    teachers: dict[str, NamedTeacherConfig] = field(default_factory=dict)
    reward: DistillationRewardConfig = field(default_factory=DistillationRewardConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
