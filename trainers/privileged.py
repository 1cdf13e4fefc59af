"""What a teacher reads in place of the student's prompt: one with a worked solution, a
demonstration, instructions."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from difflib import get_close_matches

from recipes.errors import ConfigError, DataError
from recipes.registry import nearest
from rollouts.data.examples import Example, Message
from trainers.modes.plain import Plain

FIELD = re.compile(r"\{(\w+)\}")
FIELDS = ("prompt", "solution", "answer")


def reads_another_prompt(config) -> bool:
    """Whether the teacher has a prompt of its own."""
    return config.teacher.prompt is not None or config.teacher.prompt_column is not None


def add_teacher_prompts(run) -> None:
    """Fill in `run.teacher_prompts`, rendered and tokenized as the student's prompts are.

    A teacher with a tokenizer of its own has these prompts made by it, of the student's turns where
    the config gives no others.

    Prompts that leave no room for a completion in the teacher's context are taken out of
    `run.prompts`, and counted in `run.messages`.

    Args:
        run: a `Run` (trainers/run.py) with its prompts.

    Raises:
        ConfigError: the template has a field that is none, or sources are read step by step.
        DataError: a row lacks a field, or not one prompt leaves room.
    """
    config = run.config
    check_template(config, run.mode)
    where = f"data.path={config.data.path}"
    template = config.teacher.prompt
    examples = [prompt.example for prompt in run.prompts]
    if reads_another_prompt(config):
        examples = [replace(one, messages=messages_for(one, template, where)) for one in examples]
    tokenizer = run.tokenizer if run.retokenizer is None else run.retokenizer.tokenizer
    made, _ = run.mode.render(examples, tokenizer, where, sys.maxsize)
    room = sys.maxsize
    if run.teacher_context:
        room = run.teacher_context - config.rollout.max_new_tokens
    fitting = {prompt.index: prompt.token_ids for prompt in made if len(prompt.token_ids) <= room}
    kept = [prompt for prompt in run.prompts if prompt.index in fitting]
    dropped = len(run.prompts) - len(kept)
    if not kept:
        raise DataError(
            f"{where}: with rollout.max_new_tokens={config.rollout.max_new_tokens}, all {dropped} "
            f"prompts of the teacher exceed its context of {run.teacher_context}; shorten them"
        )
    if dropped:
        run.messages.append(
            f"data  {dropped} of {len(run.prompts)} prompts are too long for the teacher's context "
            f"of {run.teacher_context} and were dropped"
        )
    run.prompts, run.teacher_prompts = kept, fitting
    longest = max(map(len, fitting.values()))
    run.messages.append(f"teacher  reads prompts of its own, of up to {longest} tokens")


def check_template(config, mode) -> None:
    """Raises ConfigError: the teacher cannot have the prompt that the config gives it."""
    teacher = config.teacher
    if teacher.prompt is not None and teacher.prompt_column is not None:
        raise ConfigError(
            "teacher.prompt and teacher.prompt_column are both given; the teacher reads one of them"
        )
    if type(mode) is not Plain:
        raise ConfigError(
            "teacher.prompt gives the teacher another source, and this method reads sources in "
            "steps; use it with streaming.layout=null"
        )
    for name in FIELD.findall(teacher.prompt or ""):
        # Other braces are the text's own, as in LaTeX.
        if name not in FIELDS and get_close_matches(name, FIELDS):
            raise ConfigError(
                f"teacher.prompt has {{{name}}}, which is no field{nearest(name, FIELDS)}"
            )


def messages_for(example: Example, template: str | None, where: str) -> list[Message]:
    """The turns that the teacher reads, their fields filled in."""
    if template is None:
        turns = example.teacher_messages or []
    else:
        turns = [*example.messages[:-1], example.messages[-1] | {"content": template}]
    return [turn | {"content": fill(turn["content"], example, where)} for turn in turns]


def fill(text: str, example: Example, where: str) -> str:
    """A text with the row's prompt, solution and answer in place of their names in braces.

    Raises:
        DataError: the row lacks one.
    """
    values = {
        "prompt": example.messages[-1]["content"],
        "solution": example.solution,
        "answer": example.answer,
    }

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in FIELDS:
            return match.group()
        if values[name] is None:
            raise DataError(
                f"{where}: row {example.index} has no {name}, which the teacher's prompt names; "
                "give it one, or drop the row"
            )
        return values[name]

    return FIELD.sub(value, text)
