"""Writes a teacher's log-probs of the data's own solutions to files, for recipe=distill.

    python -m scripts.cache_teacher teacher=DIR model=DIR data=NAME_OR_FILE out=FOLDER top_k=32

The sequences are those of recipe=sft: each prompt, then its solution and the end token. `model` is
the student, whose tokenizer and chat template make them; its weights are not read. Of each token of
a solution the cache has its log-prob and the `top_k` most likely tokens with theirs, in float32 at
temperature 1. With `top_k=0` it has the first alone.

The same command goes on where it was cut short, and leaves a finished cache as it is. Another
teacher, other data or another `top_k` needs another folder. What was left out is said on stderr.

The result is JSON on the last line of stdout. Every other key of the config works too, as in
`teacher.dtype=bfloat16`, `data.target_column=solution`, `teacher.prompt='…'` or
`train.tokens_per_microbatch=16384`. The keys `data.…` and `seed` must be those of the training.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from recipes.errors import ConfigError, DataError
from scripts.cli import (
    compose_values,
    key_values,
    launch,
    quiet_torch,
    run_command,
    whole_number,
)

SHORT_KEYS = {
    "model": "model.path",
    "teacher": "teacher.path",
    "data": "data.path",
    "dtype": "teacher.dtype",
}
OWN_KEYS = {
    "out": "Folder of the cache.",
    "top_k": "Number of tokens that are kept of each distribution; 0: the data's alone. Else 32.",
    "shard_rows": "Number of rows of a file. Else 1000.",
}


def main(arguments: list[str]) -> int:
    """Cache the teacher that the arguments name; returns the exit status."""
    return run_command(print_cache, arguments, __doc__, SHORT_KEYS | OWN_KEYS)


def print_cache(arguments: list[str]) -> None:
    values = key_values(
        arguments,
        SHORT_KEYS,
        module="scripts.cache_teacher",
        usage="teacher=DIR model=DIR data=NAME_OR_FILE out=FOLDER",
        required=("teacher", "model", "data", "out"),
    )
    folder = Path(values.pop("out")).expanduser()
    top_k = whole_number("top_k", values.pop("top_k", "32"), 0)
    shard_rows = whole_number("shard_rows", values.pop("shard_rows", "1000"), 1)
    # As in recipe=distill, so that both make the same stories.
    defaults = {"recipe": "opd", "log.wandb": "disabled", "eval.every": "-1"}
    print(json.dumps(cache(compose_values(defaults | values), folder, top_k, shard_rows)))


def cache(config, folder: Path, top_k: int, shard_rows: int) -> dict:
    """Write what the cache lacks.

    Args:
        config: of a recipe with a teacher.
        folder: of the cache.
        top_k: tokens that are kept of each distribution.
        shard_rows: rows of a file.

    Returns:
        what it has now, and how many rows were `written`.

    Raises:
        OnstreamError: a model, the data or the folder cannot be used.
    """
    from trainers.core.cache_writer import CacheWriter, facts_of, fill
    from trainers.core.progress import Progress
    from trainers.core.teacher_cache import rows_of
    from trainers.core.teachers import make_one
    from trainers.offline_distillation import OfflineDistillation
    from trainers.sft import target_ids

    check(config)
    run = prepared(config)
    tokens = run.vocab - len(run.missing)
    if top_k > tokens:
        raise ConfigError(f"top_k={top_k}: teacher and student share {tokens} tokens; lower it")
    prompts, tokenizer = run.prompts, run.tokenizer
    rows = rows_of((p.index, p.token_ids, target_ids(p, tokenizer)) for p in prompts)
    writer = CacheWriter(folder, facts_of(run, rows, top_k, shard_rows), rows)
    left = sum(len(prompts[writer.members(number)]) for number in writer.missing())
    reader = OfflineDistillation(run)

    def read(members: slice) -> list:
        return checked([reader.read(prompt) for prompt in prompts[members]], run)

    with Progress("cache", left, "rows") as progress:
        fill(writer, run, lambda: make_one(config.teacher, run), read, progress.advance)
    return {"out": str(folder), **writer.facts, "files": len(writer.files), "written": left}


def check(config) -> None:
    """Raises ConfigError: a teacher that is no single frozen model, or another temperature."""
    teacher = config.teacher
    refused = {
        "teachers.…: a cache is of one teacher; give teacher=DIR": bool(config.teachers),
        f"teacher.url={teacher.url} serves no top-k log-probs; the teacher of a cache is in this "
        "process": teacher.url is not None,
        "teacher.engine=vllm serves no top-k log-probs; use teacher.engine=hf": teacher.engine
        == "vllm",
        f"teacher.weights={teacher.weights} change in training; use frozen": teacher.weights
        != "frozen",
        f"rollout.temperature={config.rollout.temperature:g}: a cache is at temperature 1": (
            config.rollout.temperature != 1
        ),
    }
    for message, wrong in refused.items():
        if wrong:
            raise ConfigError(message)


def prepared(config):
    """A `Run` (trainers/run.py) with its prompts, and what the teacher reads in their place."""
    import torch

    quiet_torch()
    from rollouts.pretrained import context_length
    from trainers.modes import reading_mode
    from trainers.offline_distillation import OfflineDistillation
    from trainers.prepare import prepare_data, prepare_models
    from trainers.run import Run

    # The sequences are those of the training; here there is a teacher beside them.
    method = type("Cached", (OfflineDistillation,), {"distills": True})
    # What errors name.
    config = replace(config, recipe="distill")
    run = Run(config=config, mode=reading_mode(config), method=method)
    run.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_data(run, context_length(prepare_models(run)))
    for message in run.messages:
        print(message, file=sys.stderr)
    return run


def checked(trajectories: list, run) -> list:
    """The same. Raises DataError: the teacher cannot read one."""
    where, missing = f"data.path={run.config.data.path}", set(run.missing)
    for trajectory in trajectories:
        row = trajectory.prompt_index
        unread = missing.intersection(trajectory.completion_ids)
        if unread:
            token = run.tokenizer.convert_ids_to_tokens(min(unread))
            raise DataError(
                f"{where}: the solution of row {row} has {token!r}, which "
                f"teacher.path={run.config.teacher.path} lacks; change the row or the teacher"
            )
        prompt = run.teacher_prompts.get(row, trajectory.prompt_ids)
        length = len(prompt) + len(trajectory.completion_ids)
        if run.teacher_context and length > run.teacher_context:
            raise DataError(
                f"{where}: row {row} has {length} tokens, prompt and solution together, and the "
                f"teacher's context is {run.teacher_context}; lower data.max_prompt_tokens, or "
                "shorten the row"
            )
    return trajectories


if __name__ == "__main__":
    launch(main)
