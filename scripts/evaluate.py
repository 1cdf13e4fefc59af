"""Evaluates a model: Avg@k, Pass@k, mean length and truncated share, as JSON on the last line of
stdout.

    python -m scripts.evaluate model=DIR data=NAME_OR_FILE k=8 [samples=16 size=500 engine=hf temperature=0.6 …]
    python -m scripts.evaluate mode=streaming|read_then_think model=DIR data=NAME_OR_FILE k=8 […]
    python -m scripts.evaluate mode=simultaneous model=DIR data=NAME_OR_FILE proactive.head=entropy […]

`data` is anything `data.path` takes. Short keys stand for those of the config (`model` for
model.path, `k` for eval.k, …); every other key of the config works too, e.g. `data.suffix='…'` or
`rollout.batch_size=64`.

With `mode` the model thinks after each sentence that it reads (`streaming`:
streaming.layout=grouped), or has all its thoughts when all is read (`read_then_think`:
streaming.layout=batch), with the settings of recipe=streaming_sft. Then there are also the lengths
of the streaming and the deep part, the share of skipped sentences, and the latency of the answer
for a reader of `streaming.words_per_minute` (trainers/modes/streaming_metrics.py). With
`mode=simultaneous` the model reads unit by unit and writes in between, as a decision head says,
with the settings of recipe=proactivellm: quality and lag (trainers/modes/simultaneous_metrics.py).
`scripts.curves` sweeps the heads."""

from __future__ import annotations

import json
import sys
from typing import Sequence

from scripts.cli import print_error, quiet_libraries

SHORT = {
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
# values of streaming.layout
MODES = {"streaming": "grouped", "read_then_think": "batch", "simultaneous": "scheduled"}


def main(arguments: list[str]) -> int:
    """Returns the exit status; a mistake of the user's ends in one line on stderr."""
    from recipes.compose import compose
    from recipes.errors import ConfigError, OnstreamError
    from recipes.registry import nearest

    try:
        given = key_values(
            arguments,
            SHORT,
            "scripts.evaluate",
            "model=DIR data=NAME_OR_FILE k=8",
            ("model", "data"),
        )
        mode = given.pop("mode", None)
        if mode is not None:
            if mode not in MODES:
                raise ConfigError(f"mode={mode} is not known{nearest(mode, MODES)}")
            given = {"streaming.layout": MODES[mode]} | given
        # Without a teacher: none is to be made or looked for.
        recipe = {None: "sft", "simultaneous": "proactivellm"}.get(mode, "streaming_sft")
        given = {"log.wandb": "disabled", "recipe": recipe} | given
        if mode == "simultaneous":  # what its decision head is calibrated on
            given.setdefault("data.path", given["eval.path"])
        config = compose([f"{key}={value}" for key, value in given.items()])
        print(json.dumps(({"mode": mode} if mode else {}) | run(config)))
        return 0
    except OnstreamError as error:
        print_error(error)
        return 1


def key_values(
    arguments: list[str],
    short: dict[str, str],
    module: str,
    usage: str = "",
    needed: Sequence[str] = (),
) -> dict[str, str]:
    """Command-line arguments KEY=VALUE; short keys become those of the config.

    Raises:
        ConfigError: an argument is something else, or a needed key is not there.
    """
    from recipes.errors import ConfigError

    given = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(
                f"'{argument}' is not KEY=VALUE; see python -m {module}'s first lines"
            )
        given[short.get(key, key)] = value
    for key in needed:
        if short.get(key, key) not in given:
            raise ConfigError(f"{key}=… is missing: python -m {module} {usage}")
    return given


def run(config) -> dict:
    """Load, sample and score; returns the scores with what they were measured on."""
    from trainers.evaluation import evaluate
    from trainers.prepare import prepare_evaluation

    prepared = prepare_evaluation(config)
    scores, _ = evaluate(prepared)
    prepared.rollout.close()
    return {
        "model": config.model.path,
        "data": prepared.eval_name,
        "prompts": len(prepared.eval_prompts),
        "dropped": prepared.eval_dropped,
        "samples": config.eval.samples or config.eval.k,
        **scores,
    }


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))
