"""A teacher with another tokenizer than the student's: it reads and scores text in its own tokens.

A completion's text is encoded by the teacher's tokenizer, with the space that this puts before a
text, unless the prompt ends on a space or a line break. Student's and teacher's tokens are then
aligned in spans of the same bytes (trainers/core/alignment.py). The student's stop token is the
teacher's end token, a span of its own.

Left out are spans in which the student's bytes are no UTF-8, or the teacher's tokenizer changes the
text, and those past what the teacher reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from recipes.errors import DataError, ModelError
from rollouts.pretrained import context_length, vocabulary
from rollouts.trajectory import Trajectory
from trainers.core.alignment import Codec, Span, spans, text_pieces
from trainers.core.served_requests import most_new_tokens

# Prompts whose texts the tokenizers must give back at the start.
CHECKED = 64
# Teacher's tokens that are read for each token that the student may write. A teacher that reads
# bytes has about four of them for a token of English.
TOKENS = 4


class Aligned(NamedTuple):
    """A completion in the teacher's tokens, and its spans."""

    ids: list[int]
    spans: list[Span]


@dataclass(frozen=True)
class Retokenizer:
    """The two tokenizers of a run, and what of the teacher depends on its own.

    Attributes:
        tokenizer: the teacher's.
        student, teacher: both with their bytes.
        stop: the teacher's end token.
        vocab, missing: the teacher's, as in `Run`.
        room: the most tokens of a prompt and a completion that the teacher reads; None: no limit.
        limit: the most tokens of a completion that it reads.
    """

    tokenizer: Any
    student: Codec
    teacher: Codec
    stop: int
    vocab: int
    missing: tuple[int, ...]
    room: int | None
    limit: int

    def view(self, run):
        """The run as the teacher sees it: with the ids that are its own tokens."""
        return replace(run, vocab=self.vocab, missing=self.missing)

    def longest(self, prompts: Iterable[Sequence[int]]) -> int:
        """The most tokens of one of the teacher's prompts with its completion."""
        longest = max(map(len, prompts), default=1) + self.limit
        return min(longest, self.room or longest)

    def align(
        self, trajectories: Sequence[Trajectory], prompts: Sequence[Sequence[int]]
    ) -> list[Aligned]:
        """The completions in the teacher's tokens.

        Args:
            prompts: what the teacher reads before each.
        """
        return [self._aligned(one, prompt) for one, prompt in zip(trajectories, prompts)]

    def _aligned(self, trajectory: Trajectory, prompt: Sequence[int]) -> Aligned:
        stopped = trajectory.finish_reason == "stop"
        own = trajectory.completion_ids[: len(trajectory.completion_ids) - stopped]
        student = self.student.bytes_of(own, self.student.spaced(trajectory.prompt_ids))
        data = b"".join(student)
        spaced = self.teacher.spaced(prompt)
        ids, offsets = self.teacher.encode(data.decode(errors="replace"), spaced)
        found = self._spans(student, data, ids, offsets, spaced)
        if stopped:
            here, there = len(student), len(ids)
            found.append(Span(here, here + 1, there, there + 1, True))
            ids = [*ids, self.stop]
        room = self.limit if self.room is None else min(self.limit, self.room - len(prompt))
        return Aligned(ids[: max(room, 0)], found)

    def _spans(
        self,
        student: list[bytes],
        data: bytes,
        ids: list[int],
        offsets: Sequence[tuple[int, int]],
        spaced: bool,
    ) -> list[Span]:
        # Some tokenizers put no space before a text that begins with one.
        for without in (spaced, False):
            teacher = self.teacher.bytes_of(ids, without)
            if b"".join(teacher) == data:
                return spans(student, teacher)
        teacher = self.teacher.bytes_of(ids, spaced)
        return spans(student, teacher, text_pieces(data, teacher, offsets))


def make_retokenizer(run, tokenizer, model) -> Retokenizer:
    """The pair of a run with its tokenizer.

    Args:
        run: a `Run` (trainers/run.py).
        tokenizer: the teacher's.
        model: the teacher's config.

    Raises:
        ModelError: the tokens of one have no bytes of their own.
    """
    config, codecs = run.config, []
    sections = {"model": config.model, "teacher": config.teacher}
    for (name, section), one in zip(sections.items(), (run.tokenizer, tokenizer)):
        try:
            codecs.append(Codec(one))
        except ValueError as error:
            raise ModelError(
                f"{name}.path={section.path}: teacher.tokenizer=own needs the bytes of its tokens, "
                f"and {error}; use a model with another tokenizer"
            ) from None
    context = context_length(model)
    return Retokenizer(
        tokenizer,
        *codecs,
        tokenizer.eos_token_id,
        *vocabulary(tokenizer, model),
        # vLLM writes one token more. The same tokens are scored wherever the teacher runs.
        room=context and context - 1,
        limit=TOKENS * most_new_tokens(config),
    )


def check_texts(run) -> None:
    """Note in `run.messages` how many prompts the teacher's tokenizer changes.

    Raises:
        DataError: one of the two tokenizers changes every text.
    """
    pair, config = run.retokenizer, run.config
    texts = [text for prompt in run.prompts if (text := last_turn(prompt))][:CHECKED]
    sides = ("model", config.model, pair.student), ("teacher", config.teacher, pair.teacher)
    for name, section, codec in sides:
        differing = [(text, back) for text in texts if (back := codec.gives_back(text)) != text]
        if differing and len(differing) == len(texts):
            raise DataError(
                f"{name}.path={section.path}: its tokenizer makes {difference(*differing[0])} of "
                f"the prompts of data.path={config.data.path}, and teacher.tokenizer=own needs the "
                "text as it is; use a model with another tokenizer"
            )
        if differing and name == "teacher":
            run.messages.append(
                f"teacher  its tokenizer changes {len(differing)} of {len(texts)} prompts; such "
                "parts of completions do not learn"
            )


def last_turn(prompt) -> str:
    """The text of a prompt's last turn."""
    return prompt.example.messages[-1]["content"]


def difference(text: str, back: str) -> str:
    """Where a tokenizer first changes a text, as `'x' of 'y'`."""
    pairs = enumerate(zip(text, back))
    first = next((at for at, (one, other) in pairs if one != other), min(len(text), len(back)))
    part = slice(max(first - 10, 0), first + 10)
    return f"{back[part]!r} of {text[part]!r} in"


class RetokenizedTeacher:
    """Any teacher of one model, asked in its own tokens.

    Args:
        teacher: made of the run's view (`Retokenizer.view`).
        run: a `Run` with its `retokenizer` and `teacher_prompts`.
    """

    def __init__(self, teacher, run):
        self.teacher, self.run = teacher, run

    def check(self) -> None:
        """As `ServedTeacher.check`."""
        self.teacher.check()

    def annotate(self, trajectories: Sequence[Trajectory], hidden: bool = False) -> None:
        """Write `spans` and `span_teacher_logprobs` [T] in place of `teacher_targets`.

        Args:
            trajectories: of the student.
            hidden: must be false; whole distributions over other tokens cannot be compared.
        """
        assert not hidden
        prompts = [self.run.teacher_prompts[t.prompt_index] for t in trajectories]
        aligned = self.run.retokenizer.align(trajectories, prompts)
        asked = [
            in_teachers_tokens(trajectory, prompt, one.ids)
            for trajectory, prompt, one in zip(trajectories, prompts, aligned)
        ]
        if scored := [one for one in asked if one.completion_ids]:
            self.teacher.annotate(scored)
        for trajectory, (_, found), one in zip(trajectories, aligned, asked):
            write_spans(trajectory, found, one.annotations.get("teacher_logprobs"))


def in_teachers_tokens(trajectory: Trajectory, prompt: Sequence[int], ids: list[int]) -> Trajectory:
    """The trajectory that a teacher scores."""
    annotations = type(trajectory.annotations)()
    annotations["teacher_targets"] = np.array(ids, np.int64)
    return Trajectory(
        trajectory.prompt_index,
        trajectory.sample_index,
        list(prompt),
        ids,
        trajectory.finish_reason,
        annotations=annotations,
    )


def write_spans(trajectory: Trajectory, found: Sequence[Span], logprobs: np.ndarray | None) -> None:
    """Write each token's span, and the teacher's log-prob of that.

    Args:
        found: all spans of the completion.
        logprobs: the teacher's, of its own tokens that it has read; None: it has read none.
    """
    count = len(trajectory.completion_ids)
    logprobs = np.zeros(0, np.float32) if logprobs is None else logprobs
    numbers, sums = np.full(count, -1, np.int64), np.zeros(count, logprobs.dtype)
    for number, span in enumerate(found):
        whole = span.teacher_start < span.teacher_end <= len(logprobs)
        if span.same and whole:
            numbers[span.start : span.end] = number
            own = logprobs[span.teacher_start : span.teacher_end]
            sums[span.start : span.end] = own.sum(dtype=np.float64)
    trajectory.annotations.pop("teacher_targets", None)
    trajectory.annotations |= {"spans": numbers, "span_teacher_logprobs": sums}
