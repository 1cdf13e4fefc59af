"""How a function that scores completions is called: with what its signature asks for.

    def brevity(completion, answer, limit=200): …         # of one completion
    def judged(completions, answers, prompts): …          # of a batch: a list of scores

A function of one completion gets the completion and an answer; None where the row has none. If it
names them, it gets `prompt` and `row`, the row's fields by name. A function that has a parameter
`completions` is called once for a batch and gets lists: `answers`, `prompts`, `rows`. Either gets
`seconds`, its limit, if it names that. Other arguments are the config's. A class is made with the
config's section `reward`, and its object is then called.

A completion with several right answers is asked about once with each, and the best score counts. A
function with the attribute `joins_answers` gets them as one text, a line each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any, NamedTuple

from recipes.errors import ConfigError

NO_ROW: Mapping[str, Any] = MappingProxyType({})


class Question(NamedTuple):
    """A completion to score.

    Attributes:
        completion: its text.
        answers: the right ones, of which any counts.
        prompt: the text that it continues.
        row: the fields of its row by name.
    """

    completion: str
    answers: Sequence[str]
    prompt: str = ""
    row: Mapping[str, Any] = NO_ROW


class Asked(NamedTuple):
    """A completion with one answer."""

    question: Question
    answer: str | None


class Call:
    """A function, called with what it asks for.

    Attributes:
        takes_batch: it scores a batch at once.
        takes_seconds: it keeps to a limit by itself, with a TimeoutError where that is too short.

    Args:
        function: scores completions.
        where: the config key that names it, for errors.
        kwargs: of the config.

    Raises:
        ConfigError: it takes other arguments.
    """

    def __init__(self, function: Callable[..., Any], where: str = "", **kwargs: Any):
        self.joins_answers = getattr(function, "joins_answers", False)
        self.function = partial(function, **kwargs) if kwargs else function
        try:
            form = signature(function)
        except (TypeError, ValueError):
            # Python knows no signature of some functions that are written in C.
            self.offered: tuple[str, ...] = ()
            self.takes_batch = self.takes_seconds = False
            return
        names = form.parameters
        self.takes_batch, self.takes_seconds = "completions" in names, "seconds" in names
        takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in names.values())
        offers = ("answers", "prompts", "rows") if self.takes_batch else ("prompt", "row")
        self.offered = tuple(name for name in offers if takes_any or name in names)
        given = dict.fromkeys(self.offered) | ({"seconds": 0} if self.takes_seconds else {})
        try:
            if self.takes_batch:
                form.bind(completions=(), **given, **kwargs)
            else:
                form.bind("", "", **given, **kwargs)
        except TypeError as error:
            raise ConfigError(
                f"{where} cannot be called: {error}; it takes (completion, answer), or "
                "completions, and what docs/rewards.md names"
            ) from None

    def asked(self, questions: Sequence[Question]) -> list[list[Asked]]:
        """What is asked for each question: one entry per answer."""
        return [[Asked(q, answer) for answer in self._answers(q)] for q in questions]

    def _answers(self, question: Question) -> Sequence[str | None]:
        if self.joins_answers and question.answers:
            return ["\n".join(question.answers)]
        return question.answers or [None]

    def one(self, asked: Asked, seconds: float = 0.0) -> Any:
        """The score of a completion.

        Args:
            asked: the completion, with an answer.
            seconds: the limit, for a function that takes one.
        """
        question = asked.question
        extra: dict[str, Any] = {name: getattr(question, name) for name in self.offered}
        if self.takes_seconds:
            extra["seconds"] = seconds
        return self.function(question.completion, asked.answer, **extra)

    def batch(self, asked: Sequence[Asked], seconds: float) -> Any:
        """The scores of a batch: as many, each a number or None."""
        lists = {
            "answers": [answer for _, answer in asked],
            "prompts": [question.prompt for question, _ in asked],
            "rows": [question.row for question, _ in asked],
        }
        extra: dict[str, Any] = {name: lists[name] for name in self.offered}
        if self.takes_seconds:
            extra["seconds"] = seconds
        return self.function(completions=[q.completion for q, _ in asked], **extra)


def made(found: Any, options: Any) -> Callable[..., Any]:
    """The function that a name of the config stands for.

    Args:
        found: what the name leads to; a class is made with `options`.
        options: the config's section `reward`.
    """
    return found(options) if isinstance(found, type) else found
