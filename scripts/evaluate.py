"""Evaluates a model: Avg@k, Pass@k, mean length and truncated share.

    python -m scripts.evaluate model=DIR data=NAME_OR_FILE k=8
    python -m scripts.evaluate model=DIR data=NAME_OR_FILE k=8 samples=16 size=500 temperature=0.6
    python -m scripts.evaluate mode=streaming model=DIR data=NAME_OR_FILE k=8
    python -m scripts.evaluate mode=read_then_think model=DIR data=NAME_OR_FILE k=8
    python -m scripts.evaluate mode=simultaneous model=DIR data=NAME_OR_FILE proactive.head=entropy

All rows of a file are measured; `size` says otherwise. Of generated data, 400 prompts are. Without
`mode`, a completion for a file's row may have 1,024 tokens, or what the model's context leaves;
`max_new_tokens` says otherwise. What was dropped or shortened is said on stderr.

The result is JSON on the last line of stdout. `data` is anything that `data.path` takes. Every
other key of the config works too, as in `data.suffix='…'` or `rollout.batch_size=64`. Under
`torchrun --nproc_per_node=N -m scripts.evaluate …` N ranks share the prompts.

Without `mode`, the model reads the whole prompt and then answers. The modes are:

    mode=streaming         it thinks after each sentence that it reads
                           (recipe=streaming_sft, streaming.layout=grouped)
    mode=read_then_think   it has all its thoughts after the last sentence
                           (recipe=streaming_sft, streaming.layout=batch)
    mode=simultaneous      it reads unit by unit and writes in between, as a decision head says
                           (recipe=proactivellm, streaming.layout=scheduled)

The first two add the lengths of the streaming and the deep part, and the share of skipped
sentences. They also add the answer's latency for a reader of `streaming.words_per_minute`
(trainers/modes/streaming.py). The third gives quality and lag
(trainers/modes/simultaneous.py). `scripts.curves` sweeps the decision heads.
"""

from __future__ import annotations

import json
import sys

from recipes.errors import ConfigError
from recipes.registry import nearest
from scripts.cli import compose_values, key_values, launch, print_error, run_command

SHORT_KEYS = {
    "model": "model.path",
    "data": "eval.path",
    "k": "eval.k",
    "samples": "eval.samples",
    "size": "eval.size",
    "split": "eval.split",
    "temperature": "eval.temperature",
    "top_p": "eval.top_p",
    "max_new_tokens": "rollout.max_new_tokens",
    "engine": "rollout.engine",
    "dtype": "model.dtype",
}
OWN_KEYS = {"mode": "How the model reads: streaming, read_then_think or simultaneous."}
# Which rows and columns: those of the evaluation serve for the calibration of a decision head too.
OF_THE_DATA = ("split", "prompt_column", "answer_column", "target_column")
# The value of streaming.layout in each mode.
LAYOUTS = {"streaming": "grouped", "read_then_think": "batch", "simultaneous": "scheduled"}


def main(arguments: list[str]) -> int:
    """Evaluate the model that the arguments name; returns the exit status."""
    return run_command(print_scores, arguments, __doc__, SHORT_KEYS | OWN_KEYS)


def print_scores(arguments: list[str]) -> None:
    values = key_values(
        arguments,
        SHORT_KEYS,
        module="scripts.evaluate",
        usage="model=DIR data=NAME_OR_FILE k=8",
        required=("model", "data"),
    )
    mode = values.pop("mode", None)
    defaults = mode_defaults(mode, values["eval.path"])
    if mode == "simultaneous":
        defaults |= calibration_values(values)
    config = compose_values(defaults | values)
    from trainers.core import failures, watchdog

    fit = "rollout.max_new_tokens" not in values
    with failures.watched(config.deadline, print_error) as dog:
        with watchdog.phase("load"):
            run = load_run(config, fit)
        scores = evaluate_model(run)
        if dog.shown:
            about = {} if mode is None else {"mode": mode}
            print(json.dumps(about | scores))


def mode_defaults(mode: str | None, data: str) -> dict[str, str]:
    """The config values of a mode, which the user's values override.

    Raises:
        ConfigError: there is no such mode.
    """
    from trainers.evaluation import GENERATED

    defaults = {"log.wandb": "disabled"}
    if data not in GENERATED:
        # Of generated data a part is measured.
        defaults["eval.size"] = "null"
    if mode is None:
        if data not in GENERATED:
            defaults["rollout.max_new_tokens"] = "1024"
        # A recipe without a teacher: no teacher is made or looked for.
        return defaults | {"recipe": "sft"}
    if mode not in LAYOUTS:
        raise ConfigError(f"mode={mode} is not known{nearest(mode, LAYOUTS)}")
    defaults["streaming.layout"] = LAYOUTS[mode]
    if mode == "simultaneous":
        # The decision head is calibrated on `data.path`.
        return defaults | {"recipe": "proactivellm", "data.path": data}
    return defaults | {"recipe": "streaming_sft"}


def calibration_values(values: dict[str, str]) -> dict[str, str]:
    """The keys `data.…` of the data that a decision head is calibrated on: as evaluated."""
    return {
        f"data.{name}": values[f"eval.{name}"] for name in OF_THE_DATA if f"eval.{name}" in values
    }


def load_run(config, fit: bool = False):
    """The model in a rollout engine, and the evaluation data, on this rank. A collective.

    Args:
        fit: lower the limit on new tokens to what the model's context leaves.
    """
    from trainers.core import distributed
    from trainers.prepare import prepare_evaluation

    if distributed.world_size() > 1:
        distributed.setup(config.deadline.longest())
    run = prepare_evaluation(config, fit=fit)
    if distributed.rank() == 0:
        for message in run.messages:
            print(message, file=sys.stderr)
    return run


def evaluate_model(run) -> dict:
    """Sample and score; returns the scores and what they were measured on. A collective."""
    from trainers.evaluation import evaluate

    scores, _ = evaluate(run)
    run.rollout.close()
    config = run.config
    return {
        "model": config.model.path,
        "data": run.eval_name,
        "prompts": len(run.eval_prompts),
        "dropped": run.eval_dropped,
        "samples": config.eval.samples or config.eval.k,
        **scores,
    }


if __name__ == "__main__":
    launch(main)
