"""What of a run's teachers can be refused before a model loads: their models and tokenizers."""

from __future__ import annotations

from typing import Any

from recipes.errors import ConfigError, DataError
from rollouts.pretrained import context_length
from trainers.core.policy import check_architecture, check_model, unshared_tokens
from trainers.core.served_requests import is_served
from trainers.core.teacher import resolved
from trainers.core.teachers import check_stops, several_teachers, teacher_sections
from trainers.run import Run


def checked_teachers(run: Run) -> tuple[list[tuple[Any, Any]], dict[int, str]]:
    """The tokenizer and config of each teacher, and the added tokens that one does not share.

    Fill in what the run knows of them.

    Raises:
        ModelError: a teacher cannot be used; the message names it.
        ConfigError: they end on different tokens, and the end token is scored.
    """
    config, checked, stops = run.config, [], {}
    unshared: dict[int, str] = {}
    for name, section in teacher_sections(config).items():
        section = resolved(section, config.model)
        teacher, model = checked_model(name, section, config)
        hint = "" if config.teachers or not run.method.aligns else ", or teacher.tokenizer=own"
        paths = config.model.path, section.path
        unshared |= unshared_tokens(run.tokenizer, teacher, *paths, name, hint)
        stops[name] = teacher.eos_token_id
        checked.append((teacher, model))
    check_stops(stops, config)
    run.teacher_stop = next(iter(stops.values()))
    lengths = filter(None, (context_length(model) for _, model in checked))
    run.teacher_context = min(lengths, default=None)
    if described := several_teachers(config):
        run.messages.append(f"teacher  {described}; teacher.path is not read")
    return checked, unshared


def add_retokenizer(run: Run) -> None:
    """Fill in what the run knows of a teacher with a tokenizer of its own.

    Raises:
        ConfigError: the method needs scores of the student's tokens.
        ModelError: the teacher, or one of the tokenizers, cannot be used.
    """
    config = run.config
    if not run.method.aligns:
        raise ConfigError(
            f"teacher.tokenizer=own: recipe={config.recipe} needs the teacher's scores of the "
            "student's tokens; use teacher.tokenizer=shared"
        )
    from trainers.core.retokenized import make_retokenizer

    tokenizer, model = checked_model("teacher", config.teacher, config)
    run.retokenizer = make_retokenizer(run, tokenizer, model)
    run.teacher_stop, run.teacher_context = tokenizer.eos_token_id, context_length(model)


def check_tokens(run: Run) -> None:
    """Raises DataError: a prompt has a token that the teacher reads as another one."""
    if run.retokenizer is not None:
        # No tokenizer makes a token that it lacks.
        return
    sections = teacher_sections(run.config) if run.method.distills else {}
    teachers = " or ".join(f"{name}.path={section.path}" for name, section in sections.items())
    missing = set(run.missing)
    for prompt in run.prompts if missing else ():
        read = (prompt.token_ids, run.teacher_prompts.get(prompt.index, ()))
        unread = missing & {id for ids in read for id in ids}
        if unread:
            token = run.tokenizer.convert_ids_to_tokens(min(unread))
            raise DataError(
                f"data.path={run.config.data.path}: the prompt of row {prompt.index} has "
                f"{token!r}, which {teachers} lacks or has as another token; change data.template "
                "or the rows, or take a teacher with the student's tokenizer"
            )


def checked_model(name: str, section, config):
    """The tokenizer and config of a model that can be trained, or teach.

    Args:
        name: of the section of the config that names the model.
        section: that section.
        config: the run's.

    Raises:
        ModelError: the model cannot be used.
    """
    key, trusted = f"{name}.path", section.trust_remote_code
    tokenizer, model = check_model(key, section.path, trusted)
    attention = config.model.attn_implementation
    # A served teacher runs elsewhere, by other code.
    if name == "model" or not is_served(section):
        check_architecture(key, section.path, model, attention, trusted)
    return tokenizer, model
