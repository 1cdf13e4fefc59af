"""Everything that can be refused before a model loads: tokenizers, data, lengths, a resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import kernels
from recipes.components import ENGINES, TRAINERS, VERIFIERS
from recipes.errors import ConfigError, DataError
from recipes.schema.keys import as_text
from rewards.calls import made
from rewards.functions import Functions
from rollouts.data.examples import Example, Prompt, PromptSampler
from rollouts.data.load import configured_examples
from rollouts.pretrained import context_length, vocabulary
from rollouts.streaming.tokens import add_tokens
from trainers.base import Trainer
from trainers.core.operators import check_compiler
from trainers.core.policy import DTYPES, check_model
from trainers.core.rollout import make_engine
from trainers.core.rundir import run_directory
from trainers.core.served_requests import check_served, is_served
from trainers.core.teachers import (
    check_one,
    check_routes,
    several_teachers,
    teacher_sections,
)
from trainers.core.wandb_run import check_wandb
from trainers.evaluation import eval_path, read_eval_prompts
from trainers.modes import reading_mode
from trainers.prepare_teachers import (
    add_retokenizer,
    check_tokens,
    checked_model,
    checked_teachers,
)
from trainers.privileged import add_teacher_prompts, reads_another_prompt
from trainers.run import Run


def prepare(config) -> Run:
    """Check a run against its files.

    Raises:
        OnstreamError: one line that names the key or file.
    """
    method = TRAINERS.resolve(config.trainer)
    ENGINES.resolve(config.rollout.engine)
    check_precision(config, method)
    check_layout(config, method)
    run = Run(config=config, mode=reading_mode(config), method=method)
    run.verifier = made(VERIFIERS.resolve(config.reward.verifier), config.reward)
    if getattr(config.reward, "functions", None):
        run.functions = Functions(config.reward)
    method.check(config)
    sections = teacher_sections(config).values() if method.distills else ()
    served = [section for section in sections if is_served(section)]
    for section in served:
        check_served(section, config)
    check_kernels(config.kernels.backend)
    if config.engine.offload_optimizer:
        check_compiler()
    check_wandb(config, run.messages)
    run.facts = resume_facts(config)
    directory, run.checkpoint, run.start = run_directory(config, run.facts, run.messages)
    run.place(directory)
    model = prepare_models(run)
    prepare_data(run, context_length(model))
    method.prepare(run)
    if method.samples and (config.rollout.top_p < 1 or config.rollout.top_k > 0):
        run.messages.append(
            "rollout  top_p or top_k truncates the sampler, not the trainer's log-probs: a biased "
            "estimate"
        )
    if config.rollout.engine == "vllm" and not config.rollout.seeded:
        run.messages.append(
            "rollout  rollout.seeded=false: neither a repeated nor a resumed run draws the same "
            "samples"
        )
    run.max_length = max_length(run, context_length(model))
    if method.samples or run.eval_prompts:
        check_engine(run, model)
    for section in served:
        check_one(section, run)
    return run


def resume_facts(config) -> dict[str, Any]:
    """What must agree at a resume, by name: which parameters there are, and several teachers."""
    return {"lora": adapter_form(config.model.lora), "teachers": several_teachers(config)}


def adapter_form(options) -> str | None:
    """What LoRA's adapters must agree in at a resume; None: there are none."""
    if options.rank is None:
        return None
    kind = "dora" if options.dora else "lora"
    return f"{kind} of rank {options.rank}, alpha {options.alpha}, on {','.join(options.targets)}"


def prepare_evaluation(
    config, *others, unshared=(), answered: bool = True, fit: bool = False
) -> Run:
    """A run that only evaluates: the model in a rollout engine, and the evaluation data.

    Args:
        others: configs of models whose heads may lack tokens; these are not sampled then.
        unshared: ids that are not sampled, as others have other tokens there.
        answered: leave out the rows of the data that have no answer.
        fit: lower the limit on new tokens to what the model's context leaves.

    Raises:
        OnstreamError: one line that names the key or file.
    """
    ENGINES.resolve(config.rollout.engine)
    run = Run(config=config, mode=reading_mode(config))
    run.verifier = made(VERIFIERS.resolve(config.reward.verifier), config.reward)
    trusted = config.model.trust_remote_code
    run.tokenizer, model = check_model("model", config.model.path, trusted)
    run.vocab, run.missing = vocabulary(run.tokenizer, model, *others, unshared=unshared)
    run.stop_ids = tuple(dict.fromkeys([*run.tokenizer.stop_ids, *config.rollout.stop_ids]))
    read_eval_prompts(run, answered)
    if fit:
        fit_context(run, context_length(model))
    run.max_length = max_length(run, context_length(model))
    check_engine(run, model)
    start_engine(run)
    return run


def fit_context(run: Run, context: int | None) -> None:
    """Lower `rollout.max_new_tokens` to what the context leaves, if it leaves any, and say so."""
    rollout = run.config.rollout
    longest = max(run.mode.positions(p, rollout.max_new_tokens) for p in run.eval_prompts)
    fitting = rollout.max_new_tokens - longest + (context or longest)
    if 1 <= fitting < rollout.max_new_tokens:
        rollout = replace(rollout, max_new_tokens=fitting)
        run.config = run.mode.config = replace(run.config, rollout=rollout)
        run.messages.append(
            f"eval  rollout.max_new_tokens={fitting}: more do not fit the model's context of "
            f"{context} tokens"
        )


def start_engine(run: Run) -> None:
    """Load `model.path` into a rollout engine on this machine's device."""
    run.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[run.config.model.dtype]
    run.rollout = run.mode.wrap(make_engine(run.config, run.device, dtype, run.max_length))


def check_engine(run: Run, model) -> None:
    """Raises ModelError: the rollout engine refuses a model by its config."""
    check = getattr(ENGINES.resolve(run.config.rollout.engine), "check_model", None)
    # Engines from outside need not have it.
    if check is not None:
        check(run.config.model.path, model, run.max_length)


def check_precision(config, method: type[Trainer]) -> None:
    """Raises ConfigError: flash attention, which computes in 16 bits only, would get 32."""
    attention = config.model.attn_implementation
    dtypes = {"model.dtype": config.model.dtype}
    if method.distills:
        sections = teacher_sections(config)
        dtypes |= {f"{n}.dtype": s.dtype for n, s in sections.items() if not is_served(s)}
    for key, dtype in dtypes.items():
        if attention.startswith("flash") and dtype == "float32":
            raise ConfigError(
                f"model.attn_implementation={attention} computes in 16 bits, and {key}=float32; "
                "use bfloat16, or model.attn_implementation=packed"
            )


def check_layout(config, method: type[Trainer]) -> None:
    """Raises ConfigError: the method cannot use the run's `streaming.layout`."""
    layout = getattr(getattr(config, "streaming", None), "layout", None)
    if layout in method.layouts:
        return
    *others, last = map(as_text, method.layouts)
    needed = f"{', '.join(others)} or {last}" if others else last
    raise ConfigError(f"streaming.layout={as_text(layout)}: recipe={config.recipe} needs {needed}")


def prepare_models(run: Run):
    """Fill in the tokenizer and what depends on it, without reading a weight.

    Returns:
        the model's config.
    """
    config, method = run.config, run.method
    run.tokenizer, model = checked_model("model", config.model, config)
    tokenizer = run.tokenizer
    stop_ids = list(tokenizer.stop_ids)
    run.new_tokens = add_tokens(tokenizer) if method.adds_tokens else []
    # A model that gets new tokens gets rows for them.
    heads, unshared = [] if run.new_tokens else [model], {}
    if run.new_tokens:
        added = " ".join(run.new_tokens)
        run.messages.append(f"model  gets {len(run.new_tokens)} tokens it lacks: {added}")
    if method.distills and config.teacher.tokenizer == "own":
        add_retokenizer(run)
    elif method.distills:
        teachers, unshared = checked_teachers(run)
        heads += [teacher_model for _, teacher_model in teachers]
        stop_ids += [stop for teacher, _ in teachers for stop in teacher.stop_ids]
    run.vocab, run.missing = vocabulary(tokenizer, *heads, unshared=unshared)
    if unshared:
        run.messages.append(
            f"teacher  {' '.join(dict.fromkeys(unshared.values()))}: not the same tokens for "
            "student and teacher; they are not drawn"
        )
    run.stop_ids = tuple(dict.fromkeys([*stop_ids, *config.rollout.stop_ids]))
    return model


def prepare_data(run: Run, context: int | None) -> None:
    """Fill in the training and the evaluation prompts.

    Args:
        context: the model's, in tokens; None if it states none.
    """
    config, data = run.config, run.config.data
    another = run.method.distills and reads_another_prompt(config)
    changes = {"teacher_column": config.teacher.prompt_column} if another else {}
    routed = run.method.distills and config.teacher.route is not None
    if routed:
        changes["route_column"] = config.teacher.route
    examples = configured_examples(data, config.seed, **changes)
    if run.method.needs_answers(config):
        examples = answered(examples, run)
    run.prompts, dropped = run.mode.prompts(examples, run.tokenizer, f"data.path={data.path}")
    check_targets(run.prompts, run.method, config)
    if routed:
        check_routes(run.prompts, config)
    if run.method.learns and context:
        run.prompts = drop_overlong_targets(run, context)
    if dropped:
        run.messages.append(
            f"data  {dropped} of {len(examples)} prompts are longer than data.max_prompt_tokens="
            f"{data.max_prompt_tokens} and were dropped"
        )
    if run.retokenizer is not None:
        from trainers.core.retokenized import check_texts

        check_texts(run)
    if another or run.retokenizer is not None:
        add_teacher_prompts(run)
    check_tokens(run)
    run.sampler = PromptSampler(len(run.prompts), config.train.prompts_per_step, config.seed)
    if config.eval.every < 0:
        return
    if not eval_path(config):
        run.messages.append("eval  off: name held-out data with eval.path")
        return
    read_eval_prompts(run)


def answered(examples: Sequence[Example], run: Run) -> list[Example]:
    """The examples that have an answer. Raises DataError: none has."""
    config = run.config
    kept = [example for example in examples if example.answer is not None]
    if not kept:
        raise DataError(
            f"data.path={config.data.path}: no row has an answer, and recipe={config.recipe} "
            "learns from correct answers only; name its column with data.answer_column"
        )
    if len(kept) < len(examples):
        run.messages.append(
            f"data  {len(examples) - len(kept)} of {len(examples)} rows have no answer and were "
            "dropped"
        )
    return kept


def check_targets(prompts: Sequence[Prompt], method: type[Trainer], config) -> None:
    """Raises DataError: a row lacks what the method learns to write."""
    for example in (prompt.example for prompt in prompts):
        for name in method.learns:
            if getattr(example, name) is not None:
                continue
            hint = "; name its column with data.target_column" if name == "solution" else ""
            raise DataError(
                f"data.path={config.data.path}: row {example.index} has no {name}, which "
                f"recipe={config.recipe} learns to write{hint}"
            )


def drop_overlong_targets(run: Run, context: int) -> list[Prompt]:
    """The prompts that fit into the model's context with their targets.

    Raises:
        DataError: not one does.
    """
    kept = [prompt for prompt in run.prompts if target_fits(run, prompt, context)]
    where, dropped = f"data.path={run.config.data.path}", len(run.prompts) - len(kept)
    if not kept:
        raise DataError(
            f"{where}: all {dropped} examples are longer than the model's context of {context} "
            "tokens, prompt and target together; give shorter ones"
        )
    if dropped:
        run.messages.append(
            f"data  {dropped} of {len(run.prompts)} examples are longer than the model's context "
            f"of {context} tokens, prompt and target together, and were dropped"
        )
    return kept


def target_fits(run: Run, prompt: Prompt, context: int) -> bool:
    """Whether a prompt and its supervised target fit into so many tokens."""
    # A token is a byte or more, but for the marks around the parts of a target. Where all bytes
    # fit, nothing needs to be tokenized.
    most = len((prompt.example.solution or "").encode()) + len(prompt.segments) + 3
    if prompt.example.solution and run.mode.read_positions(prompt, most) <= context:
        return True
    exact = run.method.target_length(prompt, run)
    return run.mode.read_positions(prompt, exact) <= context


def check_kernels(backend: str) -> None:
    """Raises ConfigError: the kernels' backend cannot run on this machine."""
    kernels.set_backend(backend)
    try:
        kernels.active_backend("cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        raise ConfigError(f"kernels.backend={backend}: {error}") from None


def max_length(run: Run, context: int | None) -> int:
    """The longest sequence that a run may make, in tokens.

    Args:
        run: with its prompts.
        context: the model's, in tokens; None if it states none.

    Raises:
        ConfigError: a sequence would exceed the context.
    """
    config, mode = run.config, run.mode
    if run.method is not None and not run.method.samples and not run.eval_prompts:
        # Nothing is sampled.
        return context or 0
    scheduled = [limit for _, limit in config.rollout.max_new_tokens_schedule]
    new = max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0, *scheduled)
    prompts = [*run.prompts, *run.eval_prompts]
    longest = max((len(p.token_ids) + mode.extra_tokens(p) for p in prompts), default=1)
    positions = max((mode.positions(p, new) for p in prompts), default=1 + new)
    if context and positions > context:
        raise ConfigError(
            f"rollout.max_new_tokens or eval.max_new_tokens={new} after {mode.sources} of up to "
            f"{longest} tokens exceeds the model's context of {context}; lower it, or "
            "data.max_prompt_tokens"
        )
    return longest + new
