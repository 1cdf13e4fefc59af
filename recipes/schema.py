"""The typed schema: every key a run has, its type, its default and what it means. Defaults live
here only.

Batch sizes have one meaning each: `train.prompts_per_step` counts prompts over all ranks,
`rollout.samples_per_prompt` completions per prompt, `train.tokens_per_microbatch` tokens per rank.
A step is one rollout batch; `train.minibatches` is the number of optimizer updates made on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from omegaconf import MISSING


@dataclass
class RunConfig:
    dir: str = "outputs/${recipe}/${now:%Y-%m-%d_%H-%M-%S}"


@dataclass
class ModelConfig:
    # a local folder, a hub name, or stories-student / -teacher / -verbose
    path: str = "stories-student"
    dtype: str = "float32"  # float32, or bfloat16 (compute; the optimizer keeps float32 masters)
    attn_implementation: str = "packed"  # packed, flash_attention_2, flex_attention, sdpa, eager
    gradient_checkpointing: bool = False
    # of sources of frames: the dotted path of what makes it (rollouts/simultaneous/frames.py)
    encoder: Optional[str] = None


@dataclass
class TeacherConfig:
    path: str = "stories-teacher"
    dtype: str = "float32"  # float32, bfloat16, float16


@dataclass
class DataConfig:
    # stories, translation; a .jsonl, .json, .parquet or .csv file or folder; a folder of
    # line-aligned NAME.LANG files, or FOLDER/NAME of it; a Hugging Face dataset
    path: str = "stories"
    split: str = "train"
    # null: the first of the usual names that is there; frames: rollouts/simultaneous/frames.py
    prompt_column: Optional[str] = None
    answer_column: Optional[str] = None
    # the column of the text to write; null: the first of the usual names
    target_column: Optional[str] = None
    limit: Optional[int] = None  # use the first rows only
    template: str = "auto"  # chat, plain, or auto: chat where the tokenizer has a template
    system: Optional[str] = None
    suffix: Optional[str] = None  # appended to the user's turn, e.g. an answer-format instruction
    enable_thinking: bool = False  # passed to the chat template
    max_prompt_tokens: int = 512  # longer prompts are dropped and counted
    stories: int = 20000  # size of the generated set, for path=stories and path=translation
    difficulty: int = 3  # stories have 1 to this many operations
    verbose: bool = False  # the stories' solutions carry redundant steps
    # stories have 0 to this many sentences that change nothing, in training and evaluation
    distractors: int = 0
    # the stories' thoughts are now after a sentence, now at the end: to start streaming from
    varied: bool = False


@dataclass
class RolloutConfig:
    # vllm, hf, streaming (streaming.layout=grouped, batch), simultaneous (scheduled)
    engine: str = "vllm"
    samples_per_prompt: int = 1
    max_new_tokens: int = 80
    # [[step, max_new_tokens], ...]: from that step on (steps count from 1); evaluations keep their
    # own limit
    max_new_tokens_schedule: list[list[int]] = field(default_factory=list)
    # onpolicy_sft: samples of so many steps, all of the starting model, reused
    fixed_steps: Optional[int] = None
    temperature: float = 1.0  # the trainer's log-probs, student and teacher, use it too
    # below 1 (and top_k > 0) the gradient estimate is biased: the trainer does not mirror it
    top_p: float = 1.0
    top_k: int = -1
    stop_ids: list[int] = field(default_factory=list)  # besides the student's and the teacher's own
    gpu_memory_utilization: float = 0.4  # vLLM's share of a GPU
    cpu_kv_cache_gib: float = 1.0  # vLLM's KV cache on a CPU
    sleep: bool = True  # free vLLM's GPU memory during updates
    batch_size: int = 128  # sequences decoded together


@dataclass
class RewardConfig:
    token: str = "power"  # power, log_ratio, clip, tanh, zscore
    alpha: float = 5.0  # exponent of the power reward
    normalization: str = "none"  # none: p^a - q^a; box_cox: that over a
    clip: float = 1.0  # bound of `clip`, nats
    tanh_scale: float = 5.0  # tau of `tanh`, nats
    terminal_stop: str = "mask"  # raw, mask, relabel, cross_eos
    # scores whole completions; logged, and the reward of methods that use one
    verifier: str = "math"


@dataclass
class GrpoConfig:
    gamma: float = 0.5  # weight of the length reward beside accuracy
    # divide a group's advantages by its standard deviation; false: Dr. GRPO
    normalize_std: bool = True
    kl_beta: float = 0.001  # of the KL to the starting weights; 0: no reference model is loaded
    clip_low: float = 0.2  # PPO's bounds of the ratio: 1 - clip_low, 1 + clip_high
    clip_high: float = 0.2
    # Weight each token by min(exp(trainer - sampler), this), the log-probs being those before the
    # updates; null: do not
    importance_cap: Optional[float] = None


@dataclass
class HrpoConfig:
    # lambda: of the stage's own advantage against the global one; 0: GRPO
    local_weight: float = 0.5
    format_weight: float = 0.2  # w: of the format in all rewards
    # alpha: of brevity of the streaming thoughts; 0 for both: no thinking reward
    streaming_weight: float = 0.1
    # beta: of brevity of the deep segment, for which the reader waits: above alpha
    deep_weight: float = 1.0
    # of deep_weight's reward that the thoughts before it are given too (trainers/hrpo.py)
    deep_credit: float = 1.0
    # stage, sentence, boundary_token: what has a local advantage (trainers/hrpo.py)
    granularity: str = "stage"


# Values of streaming.layout that need a mask of their own, and the rollout engine of each.
MASKED_LAYOUTS = {"grouped": "streaming", "batch": "streaming", "scheduled": "simultaneous"}


@dataclass
class StreamingConfig:
    # null: not streaming. grouped: a mask and positions of its own, each thought sees the sentences
    # read before it; batch: the same, but all is read before the first thought; interleaved: in
    # order of arrival, plain causal. scheduled: a target token sees the units that a read schedule,
    # or a decision head, had read (recipe=proactivellm).
    layout: Optional[str] = None
    max_thought_tokens: int = 24  # per sentence, the closing token included
    target_offset: int = 0  # position of the first target token; all but interleaved
    instruction: str = ""  # the first source segment, after the chat template's opening
    restate_question: bool = False  # the target repeats the question, forced
    # of a scheduled source: word, sentence; frames are read by the second, whatever it is
    unit: str = "word"
    unit_seconds: float = 0.5  # of frames that are read at once
    words_per_minute: float = 150.0  # of the simulated reader
    seconds_per_token: Optional[float] = None  # of the simulated writer; null: measured


@dataclass
class ProactiveConfig:
    batch_weight: float = 1.0  # of the cross-entropy with all read
    stream_weight: float = 1.0  # of the cross-entropy under read schedules (MSLM)
    # lambda: of KL(all read || under a schedule), all read being the teacher (SPSD)
    kl_weight: float = 0.05
    top_k: int = 100  # the teacher's most likely tokens, on which that KL is taken
    top_k_tail: str = "renormalize"  # renormalize, bucket
    schedules: int = 1  # m: read schedules per example and step
    # uniform, early, late, diagonal: how they spread the reading (rollouts/simultaneous/schedules.py)
    schedule: str = "uniform"
    head: str = "entropy"  # entropy, attention, wait_k, ratio, batch; or the dotted path of one
    # the head's threshold, k or ratio; null: the quantile of a calibration set
    setting: Optional[float] = None
    quantile: float = 0.9
    calibration_path: Optional[str] = None  # null: data.path
    calibration_size: int = 200  # examples
    max_reads: Optional[int] = None  # write after so many units in a row; null: no limit
    # write when at least so many more units are read than words are written (wait_k: its k) …
    min_lag: int = 0
    max_lag: Optional[int] = None  # … and when so many are, whatever the head says; null: no limit
    # heads that are swept when training ends (scripts/curves.py)
    curve: list[str] = field(default_factory=list)
    whole_words: bool = True  # ask the head where a word begins, and not inside


@dataclass
class DivergenceConfig:
    jsd_beta: float = 0.5
    top_k: int = 100
    top_k_support: str = "teacher"  # teacher, student
    top_k_tail: str = "renormalize"  # renormalize, bucket
    top_k_direction: str = "reverse_kl"  # reverse_kl, forward_kl


@dataclass
class TrainConfig:
    steps: int = MISSING
    lr: float = MISSING
    prompts_per_step: int = MISSING
    # optimizer updates per step, on equal parts of its prompts; loss, norm: their mean
    minibatches: int = 1
    tokens_per_microbatch: int = 2048
    # What an update's summed loss is divided by. window_token_mean (or token_mean): its unmasked
    # tokens; sequence_mean: the mean over sequences of each one's token mean; max_length: sequences
    # times the longest's length. All count over ranks and micro-batches. microbatch_token_mean:
    # within each micro-batch.
    normalizer: str = "window_token_mean"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "constant"  # constant, linear, cosine: to zero at the last step
    max_grad_norm: float = 1.0  # 0: no clipping


@dataclass
class EngineConfig:
    zero_stage: int = 1
    offload_optimizer: bool = False
    offload_params: bool = False


@dataclass
class EvalConfig:
    every: int = 0  # 0: before the first step and at the end only; -1: never
    k: int = 8  # of Avg@k and Pass@k
    samples: Optional[int] = None  # n >= k completions per prompt; null: k
    size: int = 400  # prompts
    path: Optional[str] = None  # null: the held-out part of generated data, else nothing
    split: str = "heldout"
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: Optional[int] = None  # null: rollout.max_new_tokens


@dataclass
class CheckpointConfig:
    every: int = 0  # 0: at the end only
    keep: int = 2  # the newest N stay


@dataclass
class KernelsConfig:
    backend: str = "auto"  # auto (Triton on a GPU, else torch), triton, torch


@dataclass
class LogConfig:
    wandb: str = "auto"  # auto: online where a key is set, else offline; online, offline, disabled
    project: str = "onstream"
    completions: int = 4  # written to completions.jsonl per step
    every: int = 1  # steps between printed lines


@dataclass
class Config:
    recipe: str = MISSING
    trainer: str = MISSING  # a registered trainer, or the dotted path of one
    # policy_gradient, reverse_kl, forward_kl, jsd, topk, power_full
    objective: str = "policy_gradient"
    seed: int = 0
    resume: Optional[str] = None  # null, auto, or the path of a run or a checkpoint
    dry_run: bool = False  # check everything, print the config, train nothing
    # onpolicy_sft: sample from something else than the policy itself
    allow_biased_sampling: bool = False
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    hrpo: HrpoConfig = field(default_factory=HrpoConfig)
    streaming: StreamingConfig = field(default_factory=StreamingConfig)
    proactive: ProactiveConfig = field(default_factory=ProactiveConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    log: LogConfig = field(default_factory=LogConfig)
