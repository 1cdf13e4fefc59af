"""Everything that can be refused before a model loads: tokenizers, data, lengths, the run
directory, a resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
from omegaconf import DictConfig, OmegaConf

import kernels
from recipes.components import ENGINES, TRAINERS, VERIFIERS
from recipes.errors import ConfigError, DataError
from rollouts.data.examples import Prompt, PromptSampler
from rollouts.data.load import configured_examples
from rollouts.pretrained import token_count
from rollouts.streaming.tokens import add_tokens
from trainers.core import checkpoint
from trainers.core.distributed import world_size
from trainers.core.evaluation import eval_path, eval_prompts, make_prompts, max_length
from trainers.core.operators import check_compiler
from trainers.core.policy import check_model, check_same_vocabulary


@dataclass
class Prepared:
    """A checked run."""

    method: type
    tokenizer: object
    stop_ids: tuple[int, ...]
    teacher_stop: int | None
    vocab: int
    prompts: list[Prompt]
    sampler: PromptSampler
    verifier: Callable[[str, str], float]
    eval_name: str
    eval_prompts: list[Prompt]
    max_length: int
    run_dir: Path
    checkpoint: Path | None
    start: int  # steps already done
    new_tokens: list[str]  # which the model has no rows for yet
    facts: dict
    notes: list[str] = field(default_factory=list)


def prepare(config: DictConfig) -> Prepared:
    """Check a run against its files.

    Raises:
        OnstreamError: one line that names the key or file.
    """
    notes: list[str] = []
    method = TRAINERS.resolve(config.trainer)
    ENGINES.resolve(config.rollout.engine)
    verifier = VERIFIERS.resolve(config.reward.verifier)
    method.check(config)
    check_kernels(config.kernels.backend)
    if config.engine.offload_optimizer:
        check_compiler()
    facts = {"ranks": world_size(), "zero_stage": config.engine.zero_stage}
    run_dir, point, start = run_directory(config, facts, notes)

    tokenizer, model = check_model("model.path", config.model.path)
    stop_ids, teacher_stop = dict.fromkeys(tokenizer.stop_ids), None
    new_tokens = add_tokens(tokenizer) if method.adds_tokens else []
    vocab = token_count(tokenizer) if new_tokens else min(model.vocab_size, token_count(tokenizer))
    if new_tokens:
        notes.append(f"model  gets {len(new_tokens)} tokens it lacks: {' '.join(new_tokens)}")
    if method.distills:
        teacher, teacher_model = check_model("teacher.path", config.teacher.path)
        check_same_vocabulary(tokenizer, teacher, config.model.path, config.teacher.path)
        stop_ids |= dict.fromkeys(teacher.stop_ids)
        teacher_stop = teacher.eos_token_id
        vocab = min(vocab, teacher_model.vocab_size)
    stop_ids |= dict.fromkeys(config.rollout.stop_ids)

    data = config.data
    examples = configured_examples(data, config.seed)
    if method.verifies:
        found = len(examples)
        examples = [e for e in examples if e.answer is not None]
        if not examples:
            raise DataError(
                f"data.path={data.path}: no row has an answer, and recipe={config.recipe} learns from "
                "correct answers only; name its column with data.answer_column"
            )
        if len(examples) < found:
            notes.append(
                f"data  {found - len(examples)} of {found} rows have no answer and were dropped"
            )
    prompts, dropped = make_prompts(examples, tokenizer, config, f"data.path={data.path}")
    for example in (prompt.example for prompt in prompts):
        if missing := next(
            (name for name in method.learns if getattr(example, name) is None), None
        ):
            raise DataError(
                f"data.path={data.path}: row {example.index} has no {missing}, which "
                f"recipe={config.recipe} learns to write"
                + "; name its column with data.target_column"
                * (missing == "solution")
            )
    if dropped:
        notes.append(
            f"data  {dropped} of {len(examples)} prompts are longer than data.max_prompt_tokens="
            f"{data.max_prompt_tokens} and were dropped"
        )
    name, held_out = "", []
    if config.eval.every >= 0 and eval_path(config):
        name, held_out, dropped = eval_prompts(config, tokenizer)
        if dropped:
            notes.append(f"eval  {dropped} over-long prompts of {name} were dropped")
    elif config.eval.every >= 0:
        notes.append("eval  off: name held-out data with eval.path")
    if method.samples and (config.rollout.top_p < 1 or config.rollout.top_k > 0):
        notes.append(
            "rollout  top_p or top_k truncates the sampler, not the trainer's log-probs: a biased estimate"
        )
    longest = max_length(config, prompts, held_out, getattr(model, "max_position_embeddings", None))
    return Prepared(
        method,
        tokenizer,
        tuple(stop_ids),
        teacher_stop,
        vocab,
        prompts,
        PromptSampler(len(prompts), config.train.prompts_per_step, config.seed),
        verifier,
        name,
        held_out,
        longest,
        run_dir,
        point,
        start,
        new_tokens,
        facts,
        notes,
    )


def check_kernels(backend: str) -> None:
    """Raises ConfigError: the kernels' backend cannot run on this machine."""
    kernels.set_backend(backend)
    try:
        kernels.active_backend("cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise ConfigError(f"kernels.backend={backend}: {error}") from None


def run_directory(
    config: DictConfig, facts: dict, notes: list[str]
) -> tuple[Path, Path | None, int]:
    """Choose the run directory, and the checkpoint to continue from.

    Returns:
        (run directory, checkpoint or None, steps already done).

    Raises:
        ConfigError: the directory already holds another run.
        CheckpointError: the checkpoint cannot be used.
    """
    run_dir, point, start = Path(config.run.dir).expanduser(), None, 0
    if config.resume is not None:
        run_dir, point = checkpoint.find(config.resume, run_dir)
        config.run.dir = str(run_dir)
        if point is not None:
            start = checkpoint.verify(point, facts)
            notes.append(f"resume  from {point}")
            for key in changed_keys(run_dir / "config.yaml", config):
                notes.append(f"resume  {key} differs from the run's config.yaml")
        else:
            notes.append(f"resume  no checkpoint in {run_dir}: from the start")
    elif (run_dir / "metrics.jsonl").exists() or (run_dir / "checkpoints").exists():
        raise ConfigError(
            f"run.dir={run_dir} already holds a run; continue it with resume=auto, or name another "
            "directory"
        )
    return run_dir, point, start


def changed_keys(saved: Path, config: DictConfig) -> list[str]:
    """The keys whose values differ between a run's config.yaml and this config."""
    if not saved.exists():
        return []
    flat = [dict(_flatten(OmegaConf.to_container(c))) for c in (OmegaConf.load(saved), config)]
    return sorted(
        key
        for key in flat[0].keys() | flat[1].keys()
        if flat[0].get(key) != flat[1].get(key) and key not in ("resume", "run.dir", "dry_run")
    )


def _flatten(node: dict, prefix: str = ""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
