"""The keys that every run reads.

Batch sizes have one meaning each: `train.prompts_per_step` counts prompts over all ranks,
`rollout.samples_per_prompt` completions per prompt, `train.tokens_per_microbatch` tokens per rank.
A step is one rollout batch. `train.minibatches` is the number of optimizer updates made on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from recipes.components import ENGINES, TRAINERS
from recipes.errors import ConfigError
from recipes.schema.keys import REQUIRED, as_text, key
from recipes.schema.rewards import RewardConfig


@dataclass(frozen=True)
class RunConfig:
    dir: str = key(
        "outputs/${recipe}/${now:%Y-%m-%d_%H-%M-%S}",
        "Folder that receives all files of the run.",
    )


@dataclass(frozen=True)
class LoraConfig:
    rank: int | None = key(
        None,
        "Rank of the adapters. null: all weights are trained. Otherwise the model's own weights "
        "are frozen, in model.dtype.",
        at_least=1,
    )
    alpha: float = key(32.0, "An adapter's output is multiplied by alpha over the rank.", above=0)
    dropout: float = key(
        0.0, "Share of an adapter's inputs that an update drops.", at_least=0, at_most=1
    )
    targets: tuple[str, ...] = key(
        ("all-linear",),
        "Layers that get an adapter, by the ends of their names. all-linear: all linear layers but "
        "the head.",
    )
    dora: bool = key(False, "Train the size of each output's weights apart (DoRA).")


@dataclass(frozen=True)
class ModelConfig:
    path: str = key(
        "stories-student",
        "Model to train: a local folder, a Hugging Face name, or a name of docs/models.md.",
    )
    dtype: str = key(
        "float32",
        "Type of the computation. With bfloat16 the optimizer still keeps float32 weights.",
        choices=("float32", "bfloat16"),
    )
    trust_remote_code: bool = key(
        False,
        "Run the Python code that comes with a model which transformers has no class for. That "
        "code can do whatever you can on this machine.",
    )
    attn_implementation: str = key(
        "packed",
        "Attention of the trained model.",
        choices=("packed", "flash_attention_2", "flex_attention", "sdpa", "eager"),
    )
    gradient_checkpointing: bool = key(
        False, "Compute activations again in the backward pass instead of keeping them."
    )
    dropout: bool = key(
        False,
        "Keep the dropout of the model's own config in updates. Log-probs that are scored, and "
        "samples, have none, so a ratio of the two is then off.",
    )
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class DataConfig:
    path: str = key(
        "stories",
        "Training data: stories, translation, a file, a folder, or a Hugging Face data set.",
    )
    split: str = key("train", "Split of the data set to train on.")
    prompt_column: str | None = key(
        None, "Column of the prompt. null: the first of the usual names that the data has."
    )
    answer_column: str | None = key(
        None, "Column of the answer. null: the first of the usual names that the data has."
    )
    target_column: str | None = key(
        None, "Column of the text to write. null: the first of the usual names that the data has."
    )
    limit: int | None = key(None, "Number of rows to use, from the first. null: all.", at_least=1)
    template: str = key(
        "auto",
        "Form of a prompt. auto: the chat template where the tokenizer has one, else plain text.",
        choices=("auto", "chat", "plain"),
    )
    system: str | None = key(None, "System message before the user's turn.")
    suffix: str | None = key(
        None, "Text appended to the user's turn, such as an instruction on the answer's form."
    )
    enable_thinking: bool = key(False, "Value of enable_thinking in the chat template.")
    max_prompt_tokens: int = key(
        512, "Length of the longest prompt. Longer ones are dropped and counted.", at_least=1
    )
    stories: int = key(
        20000, "Number of generated examples, for path=stories and path=translation.", at_least=1
    )
    difficulty: int = key(
        3, "Largest number of operations in a generated story; the smallest is 1.", at_least=1
    )
    verbose: bool = key(False, "Write redundant steps into the generated stories' solutions.")
    distractors: int = key(
        0,
        "Largest number of sentences in a generated story that change nothing; the smallest is 0.",
        at_least=0,
    )
    varied: bool = key(
        False,
        "Solve each generated story in one of many ways: a thought comes after its sentence or at "
        "the end.",
    )


@dataclass(frozen=True)
class RolloutConfig:
    engine: str = key("vllm", "Engine that samples completions.", component=ENGINES)
    samples_per_prompt: int = key(1, "Number of completions per prompt.", at_least=1)
    max_new_tokens: int = key(80, "Length of the longest completion.", at_least=1)
    max_new_tokens_schedule: tuple[tuple[int, int], ...] = key(
        (),
        "Pairs [step, max_new_tokens], each of which holds from its step on. Steps count from 1; "
        "evaluations keep their own limit.",
        at_least=1,
    )
    temperature: float = key(
        1.0,
        "Temperature of sampling. The log-probs of student and teacher are taken at it too.",
        above=0,
    )
    top_p: float = key(
        1.0,
        "Probability mass that is sampled from. Below 1 the gradient estimate is biased, as the "
        "log-probs are those of the whole distribution.",
        above=0,
        at_most=1,
    )
    top_k: int = key(
        -1,
        "Number of most likely tokens that are sampled from; biased as top_p is.",
        off=-1,
        at_least=1,
    )
    max_mismatch: float | None = key(
        None,
        "Largest difference, in nats, between the trainer's and the sampler's log-probs before the "
        "first step; above it the run ends. Of float32 it is the largest of a token, of bfloat16 "
        "the mean. null: 1e-4 in float32, 0.01 in bfloat16, or twice the model's own rounding if "
        "that is more. -1: not checked.",
        off=-1,
        above=0,
    )
    stop_ids: tuple[int, ...] = key(
        (), "Token ids that end a completion, beside those of the student and the teacher."
    )
    gpu_memory_utilization: float = key(
        0.4, "Share of a GPU's memory that vLLM takes.", above=0, at_most=1
    )
    cpu_kv_cache_gib: float = key(1.0, "Size of vLLM's KV cache on a CPU, GiB.", above=0)
    sleep: bool = key(
        True,
        "Free vLLM's GPU memory during updates, and between evaluations where a method reads its "
        "sequences.",
    )
    seeded: bool = key(
        True,
        "Give each completion of vLLM a seed of its own. false: vLLM's own generator, which is "
        "faster on a GPU; neither a repeated nor a resumed run then draws the same samples.",
    )
    batch_size: int = key(
        128, "Number of sequences that the engines other than vLLM decode together.", at_least=1
    )


@dataclass(frozen=True)
class TrainConfig:
    steps: int = key(REQUIRED, "Number of steps.", at_least=0)
    lr: float = key(REQUIRED, "Largest learning rate of AdamW.", above=0)
    prompts_per_step: int = key(REQUIRED, "Number of prompts per step, over all ranks.", at_least=1)
    minibatches: int = key(
        1, "Number of optimizer updates per step, each on an equal part of its prompts.", at_least=1
    )
    tokens_per_microbatch: int = key(
        2048, "Number of tokens in one forward pass of a rank, prompts included.", at_least=1
    )
    normalizer: str = key(
        "token_mean",
        "What an update's summed loss is divided by. token_mean: its unmasked tokens. "
        "sequence_mean: the mean over sequences of each one's token mean. max_length: sequences "
        "times the longest's length. These three count over ranks and micro-batches. "
        "microbatch_token_mean: the unmasked tokens of each micro-batch.",
        choices=("token_mean", "sequence_mean", "max_length", "microbatch_token_mean"),
    )
    betas: tuple[float, float] = key((0.9, 0.999), "Betas of AdamW.", at_least=0, below=1)
    eps: float = key(1e-8, "Epsilon of AdamW.", above=0)
    weight_decay: float = key(0.0, "Weight decay of AdamW.", at_least=0)
    warmup_steps: int = key(0, "Number of steps over which the learning rate rises.", at_least=0)
    schedule: str = key(
        "constant",
        "Course of the learning rate after its rise; linear and cosine reach 0 at the last step.",
        choices=("constant", "linear", "cosine"),
    )
    max_grad_norm: float = key(
        1.0, "Norm to which larger gradients are scaled down. 0: never.", at_least=0
    )
    max_nonfinite: int = key(
        3,
        "Number of updates in a row with a loss or gradient that is not finite, at which the run "
        "stops. Such an update is skipped.",
        at_least=1,
    )


@dataclass(frozen=True)
class EngineConfig:
    zero_stage: int = key(
        1,
        "ZeRO stage: what DeepSpeed shards over ranks. 1: optimizer state; 2: gradients too; 3: "
        "weights too.",
        choices=(0, 1, 2, 3),
    )
    offload_optimizer: bool = key(False, "Keep the optimizer state in the host's memory.")
    offload_params: bool = key(False, "Keep the weights in the host's memory. Needs stage 3.")


@dataclass(frozen=True)
class EvalConfig:
    every: int = key(
        0,
        "Number of steps between evaluations. 0: before the first step and at the end only; -1: "
        "never.",
        at_least=-1,
    )
    k: int = key(8, "k of Avg@k and Pass@k.", at_least=1)
    samples: int | None = key(
        None, "Number of completions per prompt, k or more. null: k.", at_least=1
    )
    size: int | None = key(400, "Number of prompts, from the first. null: all.", at_least=1)
    path: str | None = key(
        None,
        "Evaluation data, as data.path. null: the held-out part of generated data, and nothing "
        "for other data.",
    )
    split: str = key("heldout", "Split of the evaluation data.")
    prompt_column: str | None = key(
        None, "Column of the prompt in the evaluation data. null: as data.prompt_column says."
    )
    answer_column: str | None = key(
        None, "Column of the answer in the evaluation data. null: as data.answer_column says."
    )
    target_column: str | None = key(
        None, "Column of the target in the evaluation data. null: as data.target_column says."
    )
    temperature: float = key(1.0, "Temperature of sampling. 0: greedy.", at_least=0)
    top_p: float = key(1.0, "Probability mass that is sampled from.", above=0, at_most=1)
    max_new_tokens: int | None = key(
        None, "Length of the longest completion. null: rollout.max_new_tokens.", at_least=1
    )


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = key(0, "Number of steps between checkpoints. 0: at the end only.", at_least=0)
    keep: int = key(2, "Number of newest checkpoints that stay.", at_least=1)


@dataclass(frozen=True)
class KernelsConfig:
    backend: str = key(
        "auto",
        "Implementation of the kernels. auto: Triton on a GPU, else torch.",
        choices=("auto", "triton", "torch"),
    )


@dataclass(frozen=True)
class LogConfig:
    wandb: str = key(
        "auto",
        "Mode of Weights & Biases. auto: what WANDB_MODE says; else online where a key of W&B is "
        "known, else offline.",
        choices=("auto", "online", "offline", "disabled"),
    )
    project: str = key("onstream", "Project of Weights & Biases.")
    completions: int = key(
        4, "Number of completions per step written to completions.jsonl.", at_least=0
    )
    every: int = key(1, "Number of steps between printed lines.", at_least=1)


@dataclass(frozen=True)
class DeadlineConfig:
    """Minutes after which a phase is overdue. Then the run ends with the phase and a stack."""

    load: float = key(
        120.0, "Checks, fetching and loading models, starting the rollout engine.", above=0
    )
    rollout: float = key(240.0, "Sampling of a step.", above=0)
    annotate: float = key(240.0, "Scores and rewards of a step's samples.", above=0)
    update: float = key(240.0, "Optimizer updates of a step.", above=0)
    sync: float = key(60.0, "Bringing the rollout engine to the trained weights.", above=0)
    save: float = key(120.0, "Writing a checkpoint.", above=0)
    evaluate: float = key(480.0, "One evaluation.", above=0)
    report: float = key(
        120.0, "Anything else: records, W&B, measurements after training, the report.", above=0
    )
    collective: float | None = key(
        None,
        "A collective, in which ranks wait for one another. null: as long as the longest phase.",
        above=0,
    )

    def phases(self) -> dict[str, float]:
        """The deadline of each phase, minutes."""
        names = (entry.name for entry in fields(self) if entry.name != "collective")
        return {name: getattr(self, name) for name in names}

    def longest(self) -> float:
        """The time that a collective may take, minutes. A phase is overdue before."""
        # A rank that is overdue first says so, and leaves a minute for it.
        return self.collective or max(self.phases().values()) + 1


@dataclass(frozen=True)
class Config:
    """The keys that every run reads. The configs of methods extend it."""

    recipe: str = key(REQUIRED, "Name of the recipe, a file of recipes/recipe/.")
    trainer: str = key(REQUIRED, "Method.", component=TRAINERS)
    seed: int = key(0, "Seed of data order, sampling and new weights.")
    resume: str | None = key(
        None,
        "Run to continue: auto for the one in run.dir, or the path of a run or a checkpoint. "
        "With a path and another run.dir, a new run starts from the checkpoint. null: start anew.",
    )
    dry_run: bool = key(False, "Check everything and print the config, but train nothing.")
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    deadline: DeadlineConfig = field(default_factory=DeadlineConfig)


def check(config: Any) -> None:
    """Refuse combinations of values that are impossible in every run.

    Raises:
        ConfigError: one line that names the key.
    """
    train, schedule = config.train, config.rollout.max_new_tokens_schedule
    steps = [pair[0] for pair in schedule]
    if steps != sorted(steps):
        raise ConfigError(
            f"rollout.max_new_tokens_schedule={as_text(schedule)} must be pairs in the "
            "order of their steps"
        )
    if train.prompts_per_step % train.minibatches:
        raise ConfigError(
            f"train.prompts_per_step={train.prompts_per_step} must be a multiple of "
            f"train.minibatches={train.minibatches}"
        )
    if config.eval.samples is not None and config.eval.samples < config.eval.k:
        raise ConfigError(
            f"eval.samples={config.eval.samples} must be at least eval.k={config.eval.k}"
        )
    deadline = config.deadline
    longest = max(deadline.phases().values())
    if deadline.collective is not None and deadline.collective < longest:
        raise ConfigError(
            f"deadline.collective={deadline.collective:g} is less than a phase's deadline of "
            f"{longest:g} minutes, in which ranks may wait for one another; raise it"
        )
    if config.engine.offload_params and config.engine.zero_stage != 3:
        raise ConfigError(
            "engine.offload_params=true needs engine.zero_stage=3, as in engine=zero3_offload"
        )
    if config.model.dtype == "bfloat16" and config.engine.zero_stage == 0:
        raise ConfigError(
            "model.dtype=bfloat16 does not go with engine.zero_stage=0, which starts AdamW with an "
            "update of its own; use engine=zero1"
        )
    if config.engine.offload_optimizer and config.engine.zero_stage == 0:
        raise ConfigError("engine.offload_optimizer=true needs engine.zero_stage=1 or more")


def check_ranks(config: Any, world_size: int) -> None:
    """Refuse more ranks than an update has prompts.

    Raises:
        ConfigError: one line that names the key.
    """
    train = config.train
    if train.prompts_per_step < world_size:
        raise ConfigError(
            f"train.prompts_per_step={train.prompts_per_step} is less than the {world_size} ranks; "
            f"give at least {world_size}, or start fewer ranks"
        )
    prompts = train.prompts_per_step // train.minibatches
    if prompts < world_size:
        raise ConfigError(
            f"train.minibatches={train.minibatches} leaves an update {prompts} prompts, less than "
            f"the {world_size} ranks; lower it, or raise train.prompts_per_step"
        )
