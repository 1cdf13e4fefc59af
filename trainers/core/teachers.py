"""Several teachers: each row has its own, or all score all rows and are averaged.

A data column (`teacher.route`) names the teacher of a row. Without one, every teacher k of weight
w_k, where the weights sum to 1, scores every token. What is averaged is one of these
(`teacher.average`):

    rewards         r = sum_k w_k r(p_k, q)
    probabilities   r = r(sum_k w_k p_k, q)

`teacher_logprobs` are those of sum_k w_k p_k in both. So the metrics and the scores that select
tokens compare the student with the mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from recipes.errors import ConfigError, DataError
from rollouts.trajectory import Trajectory
from trainers.core.metrics import compared_tokens
from trainers.core.served_requests import is_served
from trainers.core.teacher import SELF, SelfTeacher, Teacher

# Name of a metric -> (values [T], which tokens count [T] bool).
TokenMetrics = dict[str, tuple[np.ndarray, np.ndarray]]


class Teachers:
    """`teachers`. Of several, those in the process take turns on the device, once per step.

    Args:
        run: a `Run` (trainers/run.py) with its prompts.
        make: makes the teacher of a section.
    """

    def __init__(self, run, make: Callable[[Any], Any]):
        self.route = run.config.teacher.route
        sections = teacher_sections(run.config).values()
        self.by_name = dict(zip(run.config.teachers, map(make, sections)))
        self.weights = np.array(weights(run.config))
        self.names = {prompt.index: prompt.example.teacher for prompt in run.prompts}

    @property
    def head(self):
        """The head of the only teacher."""
        (teacher,) = self.by_name.values()
        return teacher.head

    @property
    def averaged(self) -> bool:
        """Whether several teachers score every row."""
        return self.route is None and len(self.by_name) > 1

    def annotate(self, trajectories: Sequence[Trajectory], hidden: bool = False) -> None:
        """As `Teacher.annotate`. Where several are averaged, write no `teacher_max_logprobs`, but
        `each_teacher_logprobs` [T, K] float32, nats."""
        found: list[list[np.ndarray]] = [[] for _ in trajectories]
        for name, teacher in self.by_name.items():
            own = [t for t in trajectories if self._scores(name, t)]
            if not own:
                continue
            teacher.annotate(own, hidden)
            if self.averaged:
                for columns, trajectory in zip(found, trajectories):
                    columns.append(trajectory.annotations["teacher_logprobs"])
        if self.averaged:
            for columns, trajectory in zip(found, trajectories):
                trajectory.annotations.pop("teacher_max_logprobs", None)
                each = np.stack(columns, axis=1)
                trajectory.annotations |= {
                    "each_teacher_logprobs": each,
                    "teacher_logprobs": mixture(each, self.weights),
                }

    def _scores(self, name: str, trajectory: Trajectory) -> bool:
        """Whether a teacher scores a trajectory."""
        return self.route is None or self.names[trajectory.prompt_index] == name

    def token_metrics(
        self,
        trajectory: Trajectory,
        student: np.ndarray,
        reward: Callable | None,
    ) -> TokenMetrics:
        """`teacher/NAME/…` of each teacher.

        Args:
            trajectory: annotated.
            student: its log-probs [T], nats.
            reward: of tokens (rewards/token.py); None: there is none.
        """
        annotations, found = trajectory.annotations, {}
        mask = annotations["mask"]
        for index, name in enumerate(self.by_name):
            scores, prefix = self._scores(name, trajectory), f"teacher/{name}"
            found[f"{prefix}/share"] = np.full(len(mask), float(scores)), mask
            if not scores:
                continue
            each = annotations.get("each_teacher_logprobs")
            teacher = annotations["teacher_logprobs"] if each is None else each[:, index]
            counted = compared_tokens(trajectory)
            found[f"{prefix}/kl"] = student.astype(np.float64) - teacher, counted
            if reward is not None:
                pair = (torch.from_numpy(np.ascontiguousarray(part)) for part in (teacher, student))
                found[f"{prefix}/reward_mean"] = reward(*pair).numpy(), mask
        return found


def make_one(section, run):
    """The teacher that a section names.

    Args:
        section: `teacher`, or one like it (`teacher_sections`).
        run: a `Run` whose policy is loaded.
    """
    if run.retokenizer is not None:
        from trainers.core.retokenized import RetokenizedTeacher

        return RetokenizedTeacher(placed(section, run.retokenizer.view(run)), run)
    return placed(section, run)


def placed(section, run):
    """The teacher that a section names, where it names it, in the tokens of `run`."""
    # The packages of each are for those who use it.
    if section.url is not None:
        from trainers.core.served_teacher import ServedTeacher

        return ServedTeacher(section, run)
    if section.engine == "vllm":
        from trainers.core.colocated_teacher import ColocatedTeacher

        return ColocatedTeacher(section, run)
    own = section.path == SELF and section.weights != "frozen"
    return SelfTeacher(run) if own else Teacher(section, run)


def check_one(section, run) -> None:
    """Refuse a served teacher before a model loads.

    Raises:
        OnstreamError: one line that names the key.
    """
    if section.url is not None:
        make_one(section, run).check()
        return
    from trainers.core.colocated_teacher import check_colocated

    check_colocated(section, run)


def make_teachers(run, say: Callable[[str], None] = print):
    """The teacher of a run whose policy is loaded, or its several.

    Args:
        say: takes a line about each as it is loaded.
    """

    def make(section):
        say(f"loading {section.path}")
        return make_one(section, run)

    return Teachers(run, make) if run.config.teachers else make(run.config.teacher)


def teacher_sections(config) -> dict[str, Any]:
    """The section of each teacher by its dotted name: `teacher`, or `teachers.NAME`, …

    Those of several are sections `teacher` too, with what the named ones set. They rest.
    """
    if not config.teachers:
        return {"teacher": config.teacher}
    sections = {}
    for name, named in config.teachers.items():
        given = {key: value for key, value in asdict(named).items() if value is not None}
        del given["weight"]
        if len(config.teachers) > 1:
            given["rest"] = True
        sections[f"teachers.{name}"] = replace(config.teacher, **given)
    return sections


def rests(section) -> bool:
    """Whether a teacher has weights of its own in this process, which `teacher.rest` moves."""
    return not is_served(section) and section.weights == "frozen"


def weights(config) -> list[float]:
    """The teachers' weights, which sum to 1."""
    given = [named.weight for named in config.teachers.values()]
    return [weight / sum(given) for weight in given]


def averages_rewards(config) -> bool:
    """Whether a token's reward is a mean over teachers."""
    teacher = config.teacher
    return len(config.teachers) > 1 and teacher.route is None and teacher.average == "rewards"


def mixture(logprobs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Log-probs of the weighted mean of probabilities [T].

    Args:
        logprobs: [T, K], nats.
        weights: [K]; their sum is 1.
    """
    mean = torch.logsumexp(torch.from_numpy(logprobs + np.log(weights)), dim=1)
    return mean.numpy().astype(logprobs.dtype)


def several_teachers(config) -> str | None:
    """The teachers in words, as a checkpoint's manifest has them; None: there is one by itself."""
    named = getattr(config, "teachers", None)
    if not named:
        return None
    parts = []
    for (name, teacher), section in zip(named.items(), teacher_sections(config).values()):
        weight = f" weight {teacher.weight:g}" if teacher.weight != 1 else ""
        parts.append(f"{name} {section.path} {section.dtype}{weight}")
    if config.teacher.route is not None:
        parts.append(f"by column {config.teacher.route}")
    elif len(named) > 1:
        parts.append(f"{config.teacher.average} averaged")
    return ", ".join(parts)


def check_teachers(config) -> None:
    """Raises ConfigError: keys of several teachers that are impossible together."""
    teacher, named = config.teacher, config.teachers
    if teacher.rest and not any(map(rests, teacher_sections(config).values())):
        raise ConfigError(
            "teacher.rest=true is of a frozen teacher in this process, and there is none; leave it "
            "out"
        )
    if not named:
        for key, default in (("route", None), ("average", "rewards")):
            if getattr(teacher, key) != default:
                raise ConfigError(
                    f"teacher.{key}={getattr(teacher, key)} is of several teachers; name them, as "
                    "in teachers.NAME.path=…"
                )
        return
    if teacher.weights != "frozen":
        raise ConfigError(
            f"teacher.weights={teacher.weights} is of one teacher, and teachers.{next(iter(named))}"
            "… names others; use teacher.weights=frozen"
        )
    if len(named) > 1 and config.objective != "policy_gradient":
        raise ConfigError(
            f"objective={config.objective} compares whole distributions with one teacher's, and "
            f"there are {len(named)}; use objective=policy_gradient, or one teacher"
        )
    averaging = {
        f"teachers.{name}.weight={entry.weight:g}": entry.weight != 1
        for name, entry in named.items()
    }
    averaging[f"teacher.average={teacher.average}"] = teacher.average != "rewards"
    for key, is_set in averaging.items():
        if is_set and teacher.route is not None:
            raise ConfigError(
                f"{key} is of a mean over teachers, and teacher.route={teacher.route} gives each "
                "row one; use one of the two"
            )


def check_routes(prompts: Iterable[Any], config) -> None:
    """Raises DataError: a row names no teacher."""
    known: Mapping[str, Any] = config.teachers
    for example in (prompt.example for prompt in prompts):
        if example.teacher in known:
            continue
        names = "names no teacher" if example.teacher is None else f"names '{example.teacher}'"
        raise DataError(
            f"data.path={config.data.path}: row {example.index} {names} in column "
            f"'{config.teacher.route}' (teacher.route); the teachers are {', '.join(known)}"
        )


def check_stops(stops: Mapping[str, int | None], config) -> None:
    """Refuse teachers that end on different tokens where the teacher's end token is scored.

    Args:
        stops: the end token of each, by the dotted name of its section.

    Raises:
        ConfigError: they do.
    """
    mode = config.reward.terminal_stop
    if mode in ("relabel", "cross_eos") and len(set(stops.values())) > 1:
        listed = ", ".join(f"{stop} of {name}" for name, stop in stops.items())
        raise ConfigError(
            f"reward.terminal_stop={mode} scores the teacher's end token, and the teachers have "
            f"different ones: {listed}; use mask or raw"
        )
