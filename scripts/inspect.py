"""Shows what a run would see of its data and model, before anything loads or trains.

    python -m scripts.inspect data=NAME_OR_FILE model=DIR
    python -m scripts.inspect data=NAME_OR_FILE model=DIR recipe=streaming_sft

It prints how the files are read, how many rows are used and why others are dropped, the lengths in
tokens, the first prompt and its target as text and as tokens, the end tokens, and what the chat
template writes. Tokens that a supervised run learns to write are «marked», or green on a terminal.

`data` and `model` are anything that `data.path` and `model.path` take. Every other key of the
config works too, as in `data.suffix='…'`. Without `recipe` it is that of supervised training or,
where no row has a target, of distillation.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from recipes.errors import DataError
from scripts.cli import compose_values, key_values, launch, run_command

SHORT_KEYS = {"data": "data.path", "model": "model.path"}
# The most characters of a text, and the most tokens, that are shown.
SHOWN_TEXT = 2000
SHOWN_TOKENS = 400
# Rows of each file by which its form is told.
FORM_ROWS = 1000


def main(arguments: list[str]) -> int:
    """Show the data and the model that the arguments name; returns the exit status."""
    return run_command(print_inspection, arguments, __doc__, SHORT_KEYS)


def print_inspection(arguments: list[str]) -> None:
    from rich.console import Console

    values = key_values(
        arguments,
        SHORT_KEYS,
        module="scripts.inspect",
        usage="data=NAME_OR_FILE model=DIR",
        required=("data", "model"),
    )
    console = Console(highlight=False, soft_wrap=True)
    for label, content in inspection(values, marks=not console.is_terminal):
        console.print(f"{label:<10}", style="bold", end="", markup=False)
        console.print(content, markup=False)


def inspection(values: dict[str, str], marks: bool) -> Iterator[tuple[str, Any]]:
    """The parts of the output, each with its label.

    Args:
        values: of the config, by key.
        marks: show the tokens that are learned without colours.

    Raises:
        OnstreamError: what the run would say about its data or model.
    """
    from rollouts.pretrained import context_length
    from trainers.prepare import prepare_data, prepare_models

    run = unprepared_run(values)
    yield from forms(run.config)
    prepare_data(run, context_length(prepare_models(run)))
    prompts, tokenizer = run.prompts, run.tokenizer
    yield "used", f"{len(prompts)} prompts, for recipe={run.config.recipe}"
    for message in run.messages:
        yield "note", message
    yield "lengths", f"prompts {spread([len(prompt.token_ids) for prompt in prompts])}"
    if run.method.learns:
        lengths = [run.method.target_length(prompt, run) for prompt in prompts]
        yield "", f"targets {spread(lengths)}"
    yield from first_example(run, marks)
    ends = (f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in run.stop_ids)
    yield "ends", ", ".join(ends)
    missing = f", {len(run.missing)} ids below have none" if run.missing else ""
    yield "ids", f"{run.vocab} of the model's head have a token{missing}"
    yield "template", template_text(run)


def unprepared_run(values: dict[str, str]):
    """A run of the recipe that was given, or else of one that suits the data.

    Raises:
        OnstreamError: the config or the data cannot be used.
    """
    from recipes.components import TRAINERS
    from rollouts.data.load import configured_examples
    from trainers.modes import reading_mode
    from trainers.run import Run

    defaults = {"eval.every": "-1"}
    config = compose_values(defaults | {"recipe": "sft"} | values)
    if "recipe" not in values:
        examples = configured_examples(config.data, config.seed)
        if not any(example.solution for example in islice(examples, len(examples))):
            # Without targets there is nothing but prompts to show.
            defaults |= {"recipe": "opd", "teacher.path": config.model.path}
            config = compose_values(defaults | values)
    return Run(config=config, mode=reading_mode(config), method=TRAINERS.resolve(config.trainer))


def forms(config) -> Iterator[tuple[str, str]]:
    """How each file is read, and the number of its rows."""
    from rollouts.data.columns import NamedColumns, form_of
    from rollouts.data.readers import sources
    from trainers.evaluation import GENERATED

    data = config.data
    if data.path in GENERATED:
        yield "data", f"{data.path}, generated: {data.stories} rows"
        return
    named = NamedColumns(data.prompt_column, data.answer_column, data.target_column)
    for source, rows in sources(data.path, data.split):
        sample = [row for _, row in islice(rows, FORM_ROWS)]
        count = len(sample) + sum(1 for _ in rows)
        columns = ", ".join(dict.fromkeys(str(name) for row in sample for name in row))
        yield "data", f"{source}: {count} rows with {columns}"
        yield "read as", form_of(source, sample, named)


def first_example(run, marks: bool) -> Iterator[tuple[str, Any]]:
    """The first prompt and its target, as text and as tokens, and the answer."""
    prompt = run.prompts[0]
    trajectory = run.method(run).read(prompt) if reads(run.method) else None
    yield "prompt", shortened(prompt.text)
    yield "", tokens_text(run.tokenizer, prompt.token_ids, [], marks)
    if trajectory is not None:
        yield "target", shortened(trajectory.completion)
        learned = trajectory.sampled_mask.tolist()
        yield "", tokens_text(run.tokenizer, trajectory.completion_ids, learned, marks)
    answers = prompt.example.right_answers
    yield "answer", " or ".join(map(repr, answers)) if answers else "none"


def reads(method) -> bool:
    """Whether a method reads a prompt's target in one way only."""
    from trainers.sft import SolutionReader

    return issubclass(method, SolutionReader)


def tokens_text(tokenizer, ids: Sequence[int], learned: Sequence[bool], marks: bool):
    """Tokens with a bar between them; those that are learned are green, or in «marks»."""
    from rich.text import Text

    text = Text()
    for place, token in enumerate(ids[:SHOWN_TOKENS]):
        is_learned = place < len(learned) and learned[place]
        piece = tokenizer.decode([token]).replace("\n", "\\n")
        if is_learned and marks:
            piece = f"«{piece}»"
        text.append("|" if place else "", style="dim")
        text.append(piece, style="green" if is_learned else "dim")
    if len(ids) > SHOWN_TOKENS:
        text.append(f" … {len(ids) - SHOWN_TOKENS} more")
    return text


def shortened(text: str) -> str:
    """The beginning of a text, and how much is left out."""
    left_out = len(text) - SHOWN_TEXT
    return text if left_out <= 0 else f"{text[:SHOWN_TEXT]} … {left_out} characters more"


def spread(lengths: Sequence[int]) -> str:
    """The smallest, the median and the largest of some lengths in tokens."""
    middle = statistics.median_low(lengths)
    return f"{min(lengths)} to {max(lengths)} tokens, the median is {middle}"


def template_text(run) -> str:
    """What the chat template writes around a user's turn."""
    from rollouts.data.chat import chat_frame, uses_chat_template

    data, tokenizer = run.config.data, run.tokenizer
    if not uses_chat_template(tokenizer, data.template):
        return "none: prompts are plain text"
    turns = [] if data.system is None else [("system", data.system)]
    try:
        before, after = chat_frame(tokenizer, turns, data.enable_thinking)
    except DataError as error:
        return str(error)
    return repr(f"{before}…{after}")


if __name__ == "__main__":
    launch(main)
