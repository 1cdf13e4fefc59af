"""Shows what a simultaneous model writes after each unit that it reads, line by line.

    python -m scripts.interpret model=DIR data=NAME_OR_FILE < sentences.txt
    python -m scripts.interpret model=DIR file=sentences.txt head=wait_k setting=3

Each line of the text is a source of its own. A head with a threshold is given it (`setting=0.5`),
or calibrated on `data`, which is anything that `data.path` takes. Short keys are `model`, `data`,
`head`, `setting`, `quantile` and `dtype`; every other key of the config works too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from scripts.cli import print_error, quiet_libraries

SHORT = {
    "model": "model.path",
    "data": "data.path",
    "head": "proactive.head",
    "setting": "proactive.setting",
    "quantile": "proactive.quantile",
    "dtype": "model.dtype",
}


def main(arguments: list[str]) -> int:
    """Returns the exit status; a mistake of the user's ends in one line on stderr."""
    from recipes.components import DECISION_HEADS
    from recipes.compose import compose
    from recipes.errors import ConfigError, OnstreamError
    from rollouts.simultaneous.decision import check_heads
    from scripts.evaluate import key_values

    try:
        given = key_values(arguments, SHORT, "scripts.interpret", "model=DIR file=PATH", ("model",))
        file = given.pop("file", None)
        given = {"recipe": "proactivellm", "log.wandb": "disabled"} | given
        config = compose([f"{key}={value}" for key, value in given.items()])
        options, head = config.proactive, config.proactive.head
        if config.streaming.layout != "scheduled":
            raise ConfigError(
                f"streaming.layout={config.streaming.layout} is not simultaneous; use recipe=proactivellm"
            )
        check_heads(options)
        if (
            DECISION_HEADS.resolve(head).calibrated
            and options.setting is None
            and options.calibration_path is None
            and "data.path" not in given
        ):
            raise ConfigError(
                f"proactive.head={head} needs a threshold: give setting=…, or data=… to calibrate it on"
            )
        for text in interpret(config, read_lines(file)):
            print(text, flush=True)
        return 0
    except OnstreamError as error:
        print_error(error)
        return 1


def read_lines(file: str | None) -> list[str]:
    """The lines that are not blank. Raises DataError: there are none, or the file cannot be
    read."""
    from recipes.errors import DataError

    try:
        text = (
            sys.stdin.read()
            if file is None
            else Path(file).expanduser().read_text(encoding="utf-8")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"file={file} cannot be read as text: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        name = "standard input" if file is None else f"file={file}"
        raise DataError(f"{name}: the text is empty; give a source a line")
    return lines


def interpret(config, lines: list[str]) -> Iterator[str]:
    """For each line, a text with its units in one column and what was written after each in
    another.

    Raises:
        OnstreamError: the model, the head or a line cannot be used.
    """
    from transformers.utils.logging import disable_progress_bar

    from rollouts.data.examples import Example
    from trainers.core.policy import check_model
    from trainers.modes import reading_mode
    from trainers.modes.plain import make_requests
    from trainers.prepare import start_engine
    from trainers.run import Run

    disable_progress_bar()
    run = Run(config=config, mode=reading_mode(config))
    run.tokenizer, _ = check_model("model", config.model.path)
    run.stop_ids = (*run.tokenizer.stop_ids, *config.rollout.stop_ids)
    examples = [
        Example(index, [{"role": "user", "content": line}]) for index, line in enumerate(lines)
    ]
    prompts, dropped = run.mode.prompts(examples, run.tokenizer, "the text")
    if dropped:
        print(
            f"{dropped} lines are longer than data.max_prompt_tokens and were left out",
            file=sys.stderr,
        )
    start_engine(run)
    sampling = run.mode.evaluation_sampling(run)
    requests = make_requests(prompts, 1, lambda index, sample: config.seed)
    for prompt, trajectory in zip(prompts, run.rollout.generate(requests, sampling)):
        yield trace(prompt, trajectory, run.tokenizer)


def trace(prompt, trajectory, tokenizer) -> str:
    """A line per unit: it, and what was written when it was the last one read."""
    units = [
        tokenizer.decode(unit, skip_special_tokens=True).strip() for unit in prompt.segments[1:]
    ]
    width = max(map(len, units))
    texts = [
        tokenizer.decode(
            [
                token
                for token, read, sampled in zip(
                    trajectory.completion_ids, trajectory.reads, trajectory.sampled
                )
                if sampled and read == place + 1
            ],
            skip_special_tokens=True,
        ).strip()
        for place in range(len(units))
    ]
    return "".join(f"{unit:<{width}}  {text}".rstrip() + "\n" for unit, text in zip(units, texts))


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))
