"""Shows what a simultaneous model writes after each unit that it reads, line by line.

    python -m scripts.interpret model=DIR data=NAME_OR_FILE < sentences.txt
    python -m scripts.interpret model=DIR file=sentences.txt head=wait_k setting=3

Each line of the text is a source of its own. A decision head with a threshold takes it from
`setting=0.5`, or is calibrated on `data`, which is anything that `data.path` takes. Every other key
of the config works too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from recipes.errors import ConfigError, DataError
from scripts.cli import compose_values, key_values, launch, run_command

SHORT_KEYS = {
    "model": "model.path",
    "data": "data.path",
    "head": "proactive.head",
    "setting": "proactive.setting",
    "quantile": "proactive.quantile",
    "dtype": "model.dtype",
}
OWN_KEYS = {"file": "Text with a source on each line; default: standard input."}


def main(arguments: list[str]) -> int:
    """Show a model at work on a text; returns the exit status."""
    return run_command(print_traces, arguments, __doc__, SHORT_KEYS | OWN_KEYS)


def print_traces(arguments: list[str]) -> None:
    values = key_values(
        arguments,
        SHORT_KEYS,
        module="scripts.interpret",
        usage="model=DIR file=PATH",
        required=("model",),
    )
    file = values.pop("file", None)
    config = compose_values({"recipe": "proactivellm", "log.wandb": "disabled"} | values)
    check_decisions(config, calibrates="data.path" in values)
    for text in demo_simultaneous(config, read_lines(file)):
        print(text, flush=True)


def check_decisions(config, calibrates: bool) -> None:
    """Refuse a config whose decision head cannot decide.

    Args:
        calibrates: whether the user gave data to calibrate a threshold on.

    Raises:
        ConfigError: the mode is another one, or the head has no setting that it can use.
    """
    from recipes.components import DECISION_HEADS
    from rollouts.simultaneous.decision import check_heads

    if config.streaming.layout != "scheduled":
        raise ConfigError(
            f"streaming.layout={config.streaming.layout} is not simultaneous; "
            "use recipe=proactivellm"
        )
    options = config.proactive
    check_heads(options)
    if not DECISION_HEADS.resolve(options.head).calibrated or calibrates:
        return
    if options.setting is None and options.calibration_path is None:
        raise ConfigError(
            f"proactive.head={options.head} needs a threshold: "
            "give setting=…, or data=… to calibrate it on"
        )


def read_lines(file: str | None) -> list[str]:
    """The lines of a file, or of standard input, that are not blank.

    Raises:
        DataError: there are none, or the file cannot be read.
    """
    try:
        if file is None:
            text = sys.stdin.read()
        else:
            text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"file={file} cannot be read as text: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        name = "standard input" if file is None else f"file={file}"
        raise DataError(f"{name}: the text is empty; give a source a line")
    return lines


def demo_simultaneous(config, lines: list[str]) -> Iterator[str]:
    """For each line, the `trace` of what the model reads and writes.

    Raises:
        OnstreamError: the model, the head or a line cannot be used.
    """
    from transformers.utils.logging import disable_progress_bar

    from rollouts.data.examples import Example
    from rollouts.pretrained import vocabulary
    from trainers.core.policy import check_model
    from trainers.modes import reading_mode
    from trainers.modes.plain import make_requests
    from trainers.prepare import start_engine
    from trainers.run import Run

    disable_progress_bar()
    run = Run(config=config, mode=reading_mode(config))
    run.tokenizer, model = check_model("model", config.model.path, config.model.trust_remote_code)
    run.vocab, run.missing = vocabulary(run.tokenizer, model)
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
    """A line per unit: the unit, and what was written while it was the last one read."""

    def decode(ids) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    # The first segment is what comes before the source.
    units = [decode(unit) for unit in prompt.segments[1:]]
    written: list[list[int]] = [[] for _ in units]
    tokens = zip(trajectory.completion_ids, trajectory.reads, trajectory.sampled)
    for token, units_read, sampled in tokens:
        # A token that was forced, not sampled, is no decision of the model's.
        if sampled and 1 <= units_read <= len(units):
            written[units_read - 1].append(token)
    width = max(map(len, units))
    lines = [f"{unit:<{width}}  {decode(ids)}".rstrip() for unit, ids in zip(units, written)]
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    launch(main)
