"""What vLLM answers, checked in everything that a wrong log-prob could hide in."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from recipes.errors import TeacherError, one_line
from rollouts.trajectory import Trajectory

# HTTP statuses of a server that may answer later, beside those from 500 on.
PASSING = (408, 425, 429)
# What vLLM sends for a log-prob of -inf, which JSON has no number for.
CLAMPED = -9999.0
# What rounding adds to a log-prob, nats.
ROUNDING = 1e-3


def open_session() -> httpx.AsyncClient:
    """A session without limits of its own. `VLLM_API_KEY` is the servers' --api-key."""
    key = os.environ.get("VLLM_API_KEY")
    return httpx.AsyncClient(
        timeout=None,
        limits=httpx.Limits(max_connections=None),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        # A proxy of the environment is for other hosts.
        trust_env=False,
    )


async def call(session: httpx.AsyncClient, url: str, path: str, body: Any = None) -> Any:
    """The JSON that a server answers.

    Args:
        url: of the server; `path` follows it.
        body: is posted; None: a GET.

    Raises:
        httpx.TransportError: it does not answer now.
        TeacherError: it refuses, or its answer is no JSON.
    """
    method = "GET" if body is None else "POST"
    response = await session.request(method, url + path, json=body)
    said = one_line(ValueError(response.content[:200].decode(errors="replace")))
    if response.status_code >= 500 or response.status_code in PASSING:
        raise httpx.TransportError(f"status {response.status_code}, {said}")
    if response.status_code in (401, 403):
        raise TeacherError(f"teacher.url={url} asks for a key; set VLLM_API_KEY to its --api-key")
    if response.status_code != 200:
        raise TeacherError(
            f"teacher.url={url} refuses {path}, status {response.status_code}: {said}; it must be "
            "the address of vLLM's API, as http://HOST:PORT/v1"
        )
    try:
        return json.loads(response.content)
    except ValueError:
        raise TeacherError(f"teacher.url={url} answers what is no JSON: {said}") from None


async def together(work: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Await all. The first error ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors


def checked_card(answer: Any, url: str, names: Collection[str]) -> dict[str, Any]:
    """The entry of a server's list of models that names the teacher.

    Args:
        answer: of GET /models.
        names: of the teacher; the shortest is for the error.

    Raises:
        TeacherError: there is none.
    """
    try:
        cards = [(card["id"], card.get("root") or card["id"], card) for card in answer["data"]]
    except (KeyError, TypeError, AttributeError):
        raise unreadable(f"teacher.url={url}", "a list of models") from None
    for name, root, card in cards:
        folder = str(Path(root).resolve()) if Path(root).is_dir() else root.rstrip("/")
        if {name, folder} & set(names):
            return card
    shown = min(names, key=len)
    raise TeacherError(
        f"teacher.url={url} serves {', '.join(name for name, _, _ in cards) or 'nothing'}, not "
        f"teacher.path={shown}; start it with that model, or where it has another path there, with "
        f"--served-model-name {shown}"
    )


def checked_logprobs(answer: Any, ids: list[int], rows: int, url: str) -> np.ndarray:
    """As `sound_logprobs`, of a server's answer.

    Args:
        answer: of POST /completions.
    """
    try:
        [choice] = answer["choices"]
        scored = choice["prompt_token_ids"]
        entries = [
            entry and {int(id): (token["logprob"], token["rank"]) for id, token in entry.items()}
            for entry in choice["prompt_logprobs"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise unreadable(f"teacher.url={url}", "the log-probs of what it was asked for") from None
    values = sound_logprobs(scored, entries, ids, rows, f"teacher.url={url}")
    values[values <= CLAMPED] = -np.inf
    return values


def sound_logprobs(
    scored: list[int],
    entries: Sequence[Mapping[int, tuple[float, int]] | None],
    ids: list[int],
    rows: int,
    teacher: str,
) -> np.ndarray:
    """Log-probs of `ids[1:]` and of the most likely token in the place of each.

    Args:
        scored: the ids that vLLM scored.
        entries: each place's log-probs and ranks, by id; those of the first are not read.
        ids: that were asked for, N.
        rows: of the teacher's head.
        teacher: `teacher.url=…` or `teacher.engine=vllm`, for the error.

    Returns:
        [2, N - 1] float32, in nats.

    Raises:
        TeacherError: another form, other ids, or what are no log-probs.
    """
    if scored != ids or len(entries) != len(ids):
        raise TeacherError(
            f"{teacher} scored other tokens than it was asked for, {len(scored)} with "
            f"{len(entries)} log-probs for {len(ids)}"
        )
    try:
        pairs = [(entry[id][0], likeliest(entry)) for id, entry in zip(ids[1:], entries[1:])]
        values = np.array(pairs, np.float32).reshape(-1, 2).T
    except (KeyError, TypeError, ValueError):
        raise unreadable(teacher, "the log-probs of what it was asked for") from None
    chosen, likely = values
    # The most likely of so many tokens has at least an equal share.
    least = -math.log(rows) - ROUNDING
    sound = (chosen <= likely + ROUNDING) & (likely <= ROUNDING) & (likely >= least)
    if not sound.all():
        place = int(np.argmin(sound))
        raise TeacherError(
            f"{teacher} gives {chosen[place]:g} for token {ids[place + 1]} and "
            f"{likely[place]:g} for the most likely one, which are no log-probs; vLLM gives them "
            "with --logprobs-mode raw_logprobs"
        )
    return values


def likeliest(entry: Mapping[int, tuple[float, int]]) -> float:
    """The log-prob of the most likely token of a place. Raises ValueError: it is not there."""
    return max(logprob for logprob, rank in entry.values() if rank == 1)


def write_logprobs(trajectory: Trajectory, logprobs: np.ndarray) -> None:
    """Write `teacher_logprobs` and `teacher_max_logprobs` [T] of the completion.

    Args:
        logprobs: of prompt and completion, [2, N - 1].
    """
    count = len(trajectory.completion_ids)
    for name, values in zip(("teacher_logprobs", "teacher_max_logprobs"), logprobs):
        trajectory.annotations[name] = values[len(values) - count :]


def differing_token(answer: Any, ids: list[int], tokenizer: Any) -> str:
    """The first of `ids[1:]` that a server has another text for, in words; empty: none.

    Args:
        answer: of POST /completions, sound in form.
        tokenizer: the teacher's, as its files have it.
    """
    for id, entry in zip(ids[1:], answer["choices"][0]["prompt_logprobs"][1:]):
        ours, theirs = tokenizer.decode([id]), entry[str(id)].get("decoded_token")
        # A part of a letter's bytes is no text by itself.
        if "\ufffd" not in ours and (theirs is None or ours.strip() != theirs.strip()):
            return f"token {id} is {theirs!r} there, and {ours!r} in teacher.path"
    return ""


def unreadable(teacher: str, what: str) -> TeacherError:
    """The error of an answer in another form."""
    return TeacherError(f"{teacher} answers something else than {what}; it must be vLLM's")
