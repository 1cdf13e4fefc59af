"""Evaluation: n completions per prompt, judged by a verifier, as Avg@k, Pass@k, length and
truncated share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Callable, Sequence

import numpy as np

from recipes.errors import ConfigError, DataError
from recipes.schema import MASKED_LAYOUTS
from rewards.metrics.pass_at_k import avg_at_k, pass_at_k
from rollouts.data.chat import tokenize_prompts
from rollouts.data.examples import Example, Prompt
from rollouts.data.load import configured_examples
from rollouts.simultaneous.prompts import unit_prompts
from rollouts.streaming.prompts import streaming_prompts
from rollouts.trajectory import Trajectory, sample_seed
from trainers.core.distributed import gather, rank, share
from trainers.core.progress import Progress
from trainers.modes.rollout import make_requests, make_sampling, written_tokens
from trainers.modes.simultaneous_metrics import make_head, simultaneous_metrics
from trainers.modes.streaming_metrics import streaming_metrics


def data_name(path: str) -> str:
    """The name a data set has in metric names: a file's or folder's stem, a hub name's last
    part."""
    return Path(path.rstrip("/")).stem


def eval_path(config) -> str | None:
    """What is evaluated on: `eval.path`, else the held-out part of generated data when training on
    it, else nothing."""
    return config.eval.path or (
        config.data.path if config.data.path in ("stories", "translation") else None
    )


def eval_prompts(config, tokenizer) -> tuple[str, list[Prompt], int]:
    """The evaluation prompts.

    Returns:
        (the data's name, prompts, how many were dropped as over-long).

    Raises:
        DataError: the data cannot be used, or no row of it has an answer.
    """
    path = eval_path(config)
    examples = configured_examples(
        config.data,
        config.seed,
        path,
        split=config.eval.split,
        limit=config.eval.size,
        size=config.eval.size,
        verbose=False,
        varied=False,
    )
    if not any(e.answer is not None for e in examples):
        raise DataError(
            f"eval.path={path}: no row has an answer to score against; name its column with "
            "data.answer_column"
        )
    return data_name(path), *make_prompts(
        [e for e in examples if e.answer is not None], tokenizer, config, f"eval.path={path}"
    )


def make_prompts(
    examples: Sequence[Example], tokenizer, config, where: str
) -> tuple[list[Prompt], int]:
    """The prompts that the examples make, in segments where the run streams, and how many were
    dropped as over-long.

    Raises:
        DataError: an example cannot be used, or not one prompt fits; the message has `where`.
    """
    if config.streaming.layout == "scheduled":
        return unit_prompts(examples, tokenizer, config, where)
    if config.streaming.layout is not None:
        return streaming_prompts(examples, tokenizer, config, where)
    data = config.data
    return tokenize_prompts(
        examples,
        tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        template=data.template,
        system=data.system,
        suffix=data.suffix,
        enable_thinking=data.enable_thinking,
    )


def describe(
    trajectory: Trajectory, prompt: Prompt, tokenizer, verifier: Callable[[str, str], float] | None
) -> None:
    """Add the texts and, where the example has an answer, the verifier's score. The stop token is
    not text; of a streaming completion, the deep segment is judged."""
    ids = (
        trajectory.completion_ids[:-1]
        if trajectory.finish_reason == "stop"
        else trajectory.completion_ids
    )
    if trajectory.reads is not None:
        ids = ids[len(trajectory.sampled) - int(trajectory.sampled.sum()) :]  # without the opening
    trajectory.prompt, trajectory.answer = prompt.text, prompt.example.answer
    trajectory.completion = judged = tokenizer.decode(ids)
    if trajectory.slots is not None:
        judged = tokenizer.decode(ids[int((trajectory.slots < trajectory.slots[-1]).sum()) :])
    if trajectory.answer is not None and verifier is not None:
        trajectory.score = verifier(judged, trajectory.answer)


def evaluate(
    rollout,
    prompts: Sequence[Prompt],
    config,
    tokenizer,
    stop_ids: Sequence[int],
    verifier: Callable[[str, str], float],
    what: str = "eval",
) -> tuple[dict[str, float], list[Trajectory]]:
    """Sample and judge. A collective: each rank takes its share of the prompts. `what` names it in
    the progress shown.

    The seeds depend on the prompt and sample only, so every evaluation of a run uses the same
    noise.

    Returns:
        `avg@k`, `pass@k`, `length_mean` (tokens), `truncated_frac`, `efficiency` (accuracy in % per
        token), and where the run streams, those of `streaming_metrics` or `simultaneous_metrics`;
        and this rank's trajectories.
    """
    k, count = config.eval.k, config.eval.samples or config.eval.k
    sampling = make_sampling(
        config,
        tokenizer,
        stop_ids,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        max_new_tokens=config.eval.max_new_tokens or config.rollout.max_new_tokens,
    )
    requests = make_requests(
        share(list(prompts)),
        count,
        lambda index, sample: sample_seed(config.seed, 0, index, sample, "eval"),
    )
    by_index = {p.index: p for p in prompts}
    if config.streaming.layout == "scheduled":
        sampling = replace(sampling, head=make_head(config, rollout, tokenizer, sampling))
    with Progress(what, len(requests), "completions", shown=rank() == 0) as progress:
        trajectories = rollout.generate(requests, sampling, on_finished=progress.advance)
    judged = []
    for trajectory in trajectories:
        describe(trajectory, by_index[trajectory.prompt_index], tokenizer, verifier)
        judged.append(
            (
                trajectory.score > 0,
                int(trajectory.sampled_mask.sum()),
                trajectory.finish_reason == "length",
            )
        )
    judged = [row for part in gather(judged) for row in part]
    correct = np.array([row[0] for row in judged]).reshape(-1, count).tolist()
    accuracy, length = avg_at_k(correct), float(np.mean([row[1] for row in judged]))
    scores = {
        f"avg@{k}": accuracy,
        f"pass@{k}": pass_at_k(correct, k),
        "length_mean": length,
        "truncated_frac": float(np.mean([row[2] for row in judged])),
        "efficiency": 100 * accuracy / length,
    }
    if config.streaming.layout == "scheduled":
        scores |= simultaneous_metrics(prompts, trajectories, sampling.word_starts)
        scores["head_setting"] = sampling.head.setting
    elif config.streaming.layout is not None:
        scores |= streaming_metrics(
            rollout, prompts, trajectories, sampling, config, tokenizer, stop_ids
        )
    return scores, trajectories


def max_length(
    config, prompts: Sequence[Prompt], others: Sequence[Prompt], context: int | None
) -> int:
    """The longest sequence a run may make, in tokens.

    Raises:
        ConfigError: it exceeds the model's context.
    """
    lengths = [(len(p.token_ids), written_tokens(config, p)) for p in [*prompts, *others]] or [
        (1, 0)
    ]
    longest = max(map(sum, lengths))
    rollout = config.rollout
    new = max(
        rollout.max_new_tokens,
        config.eval.max_new_tokens or 0,
        *(n for _, n in rollout.max_new_tokens_schedule),
    )
    reach = longest + new
    if config.streaming.layout in MASKED_LAYOUTS:  # source and target have positions of their own
        reach = max(
            max(source, config.streaming.target_offset + more + new) for source, more in lengths
        )
    if context and reach > context:
        what = "prompts" if config.streaming.layout is None else "sources and thoughts"
        raise ConfigError(
            f"rollout.max_new_tokens or eval.max_new_tokens={new} after {what} of up to {longest} tokens "
            f"exceeds the model's context of {context}; lower it, or data.max_prompt_tokens"
        )
    return longest + new
