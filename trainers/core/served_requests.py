"""What is asked of a teacher that vLLM runs, and what it is not asked."""

from __future__ import annotations

from pathlib import Path

from recipes.embedded import model_folder
from recipes.errors import ConfigError, TeacherError
from rollouts.trajectory import Trajectory
from trainers.core.teacher import SELF


def urls_of(section) -> list[str]:
    """The addresses of `teacher.url`, without a final slash."""
    return [url.strip().rstrip("/") for url in section.url.split(",") if url.strip()]


def is_served(section) -> bool:
    """Whether vLLM scores: on the servers of `teacher.url`, or beside this process."""
    return section.url is not None or section.engine == "vllm"


def check_served(section, config) -> None:
    """Refuse a run that needs more of its teacher than vLLM gives.

    Args:
        section: `teacher`, with a `url` or `engine=vllm`.
        config: the run's.

    Raises:
        ConfigError: one line that names the key.
    """
    named, other = "teacher.engine=vllm", "use teacher.engine=hf"
    if section.url is not None:
        check_urls(section)
        named, other = f"teacher.url={section.url}", "leave teacher.url out"
    temperature = config.rollout.temperature
    if section.path == SELF:
        raise ConfigError(f"{named} goes with the name of a model, not teacher.path={SELF}")
    if config.objective != "policy_gradient":
        raise ConfigError(
            f"objective={config.objective} compares whole distributions, and {named} serves those "
            f"of sampled tokens; use objective=policy_gradient, or {other}"
        )
    if temperature != 1:
        raise ConfigError(
            f"{named} serves log-probs at temperature 1; use rollout.temperature=1 in place of "
            f"{temperature:g}, or {other}"
        )


def check_urls(section) -> None:
    """Raises ConfigError: `teacher.url` has no addresses, or stands beside another place."""
    urls = urls_of(section)
    if not urls or not all(one.startswith(("http://", "https://")) for one in urls):
        raise ConfigError(
            f"teacher.url={section.url} must be addresses as http://HOST:PORT/v1, with commas "
            "between them"
        )
    if section.engine == "vllm":
        raise ConfigError(
            f"teacher.engine=vllm scores beside this process, and teacher.url={section.url} "
            "elsewhere; leave one of them out"
        )


def names_of(section) -> set[str]:
    """What a server may call the model of `teacher.path`."""
    folder = model_folder(section.path)
    return {section.path, folder, str(Path(folder).resolve())}


def scored_ids(trajectory: Trajectory) -> list[int]:
    """Prompt and completion, with the last id that the teacher scores in place of the last drawn.

    No other id is scored after it.

    Raises:
        TeacherError: another target is not the id that was drawn. The ids after it would be scored
            after the wrong text.
    """
    drawn = trajectory.completion_ids
    targets = trajectory.annotations["teacher_targets"].tolist()
    if targets[:-1] != drawn[:-1]:
        raise TeacherError(
            f"prompt {trajectory.prompt_index}: a teacher that vLLM runs scores the ids that were "
            "drawn, and the method asks for others before the last; use teacher.engine=hf without "
            "teacher.url"
        )
    return [*trajectory.prompt_ids, *targets]


def longest_sequence(run) -> int:
    """The most tokens of a training prompt, as the teacher reads it, with its completion."""
    prompts = run.teacher_prompts.values() or [prompt.token_ids for prompt in run.prompts]
    if run.retokenizer is not None:
        return run.retokenizer.longest(prompts)
    return max(map(len, prompts), default=1) + most_new_tokens(run.config)


def most_new_tokens(config) -> int:
    """The most tokens of a completion in any step."""
    rollout = config.rollout
    return max(rollout.max_new_tokens, *(limit for _, limit in rollout.max_new_tokens_schedule), 0)
