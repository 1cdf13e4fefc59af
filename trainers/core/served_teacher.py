"""A teacher that vLLM servers run: its log-probs come over their OpenAI-compatible API.

A request holds the ids of a prompt and its completion, and asks for one more token and for
`prompt_logprobs=1`: the log-probs of each id, and of the most likely one there. They are at
temperature 1 and of the whole head, so other temperatures and whole distributions are refused.

An answer that fits its request in everything is used, and any other ends the run. Before a server
is used in a step, and after each failure, it must name `teacher.path` and score the same ids twice
alike, as before, and as the other servers do.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

import httpx
import numpy as np
import tenacity
from tqdm import tqdm

from recipes.errors import ConfigError, TeacherError, one_line
from rollouts.trajectory import Trajectory
from trainers.core.policy import check_model
from trainers.core.served_answers import (
    call,
    checked_card,
    checked_logprobs,
    differing_token,
    open_session,
    together,
    write_logprobs,
)
from trainers.core.served_requests import longest_sequence, names_of, scored_ids, urls_of
from trainers.core.teacher import as_teacher_reads
from trainers.core.watchdog import heard

# Ids that are scored twice: more than two blocks of vLLM's cache, which are of up to 128.
PROOF_TOKENS = 280
# What two scores of the same ids may differ by, nats: the largest in float32, the mean in 16 bits.
ALIKE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
# Between two attempts, seconds.
LONGEST_PAUSE = 10.0


class Unavailable(TeacherError):
    """A server does not answer now; a later request may succeed."""


class ServedTeacher:
    """Scores trajectories on the servers of `teacher.url`. Each rank asks for its own.

    Args:
        section: `teacher`, with `url` and `path`.
        run: a `Run` (trainers/run.py) with its tokenizers and prompts.

    Raises:
        ModelError: `path` has no tokenizer or config.
    """

    def __init__(self, section, run):
        self.section, self.run = section, run
        self.urls = urls_of(section)
        self.turns = itertools.cycle(self.urls)
        self.tokenizer, model = check_model("teacher.path", section.path, section.trust_remote_code)
        self.rows = model.get_text_config().vocab_size
        # Servers that have proved themselves in this step, and those that have failed since.
        self.proved: set[str] = set()
        self.failed: set[str] = set()
        # The name under which each serves the model.
        self.served: dict[str, str] = {}
        # The log-probs that every proof gives.
        self.proof: np.ndarray | None = None

    def check(self) -> None:
        """Prove every server, and note which rows of the head count in them alone.

        Raises:
            TeacherError: one does not answer in time, or not as it must.
        """

        async def prove_all() -> None:
            async with open_session() as session:
                await together(self._patiently(session, [], url) for url in self.urls)

        self._run(prove_all())
        others = self.rows - self.run.vocab + len(self.run.missing)
        if others:
            whose = "student" if self.run.retokenizer is None else "teacher"
            self.run.messages.append(
                f"teacher  a server's probabilities count {others} rows of the head that are no "
                f"tokens of the {whose}"
            )

    def annotate(self, trajectories: Sequence[Trajectory], hidden: bool = False) -> None:
        """Write `teacher_logprobs` and `teacher_max_logprobs` [T] (float32, nats).

        Args:
            trajectories: with the annotation `teacher_targets`, the ids that are scored.
            hidden: must be false; hidden states are not served.

        Raises:
            TeacherError: a server does not answer in time, or not as it must. The last failure
                is named.
        """
        if hidden:
            raise ConfigError(f"teacher.url={self.section.url} serves no hidden states")
        self._run(self._annotate(as_teacher_reads(self.run, trajectories)))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        self.proved.clear()
        self.failed.clear()
        # A lock belongs to one event loop.
        self.proving = {url: asyncio.Lock() for url in self.urls}
        asyncio.run(work)

    async def _annotate(self, trajectories: Sequence[Trajectory]) -> None:
        limit = asyncio.Semaphore(self.section.concurrency)

        async def score(trajectory: Trajectory) -> None:
            async with limit:
                logprobs = await self._patiently(session, scored_ids(trajectory))
            write_logprobs(trajectory, logprobs)

        async with open_session() as session:
            await together(map(score, trajectories))

    async def _patiently(
        self, session: httpx.AsyncClient, ids: list[int], url: str | None = None
    ) -> np.ndarray:
        """Ask until there is an answer, or `teacher.retry_seconds` are over.

        Args:
            ids: to score; none: the server is proved alone.
            url: of the server; None: the next one, at each attempt.

        Returns:
            the log-probs of `ids[1:]` and of the most likely tokens there, [2, T].
        """
        section, answer = self.section, np.zeros((2, 0), np.float32)
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE),
            stop=tenacity.stop_before_delay(section.retry_seconds),
            reraise=True,
        ):
            with attempt:
                chosen = url or self._next_url()
                try:
                    async with asyncio.timeout(section.request_seconds):
                        await self._prove(session, chosen)
                        if ids:
                            answer = await self._logprobs(session, chosen, ids)
                except (TimeoutError, httpx.TransportError) as error:
                    raise self._failure(chosen, error) from error
                self.failed.discard(chosen)
        return answer

    def _next_url(self) -> str:
        """The next server in turn; one that has failed in this step, only where all have."""
        for _ in self.urls:
            url = next(self.turns)
            if url not in self.failed:
                break
        return url

    def _failure(self, url: str, error: Exception) -> Unavailable:
        """The error of a server that may answer later. The first of a step is printed."""
        reason = one_line(error)
        if isinstance(error, TimeoutError):
            reason = f"no answer within teacher.request_seconds={self.section.request_seconds:g}"
        line = f"teacher.url={url} does not answer: {reason}"
        if url not in self.failed:
            waits = f"asking again for up to {self.section.retry_seconds:g} s"
            tqdm.write(f"teacher  {line}; {waits}", file=sys.stdout)
            heard()
        self.proved.discard(url)
        self.failed.add(url)
        return Unavailable(f"{line}; start the server, or raise teacher.retry_seconds")

    async def _prove(self, session: httpx.AsyncClient, url: str) -> None:
        """Raises TeacherError: the server is not the teacher, or its log-probs cannot be trusted.

        vLLM 0.32 reads no cached prefix where prompt log-probs are asked for; the second score
        would come from the cache of one that does.
        """
        async with self.proving[url]:
            if url in self.proved:
                return
            card = checked_card(await call(session, url, "/models"), url, names_of(self.section))
            room = card.get("max_model_len")
            if room and room <= (longest := longest_sequence(self.run)):
                raise TeacherError(
                    f"teacher.url={url} takes {room} tokens, and a sequence may have {longest} and "
                    "one more; start the server with a longer --max-model-len, or lower "
                    "rollout.max_new_tokens"
                )
            self.served[url] = card["id"]
            ids = self._proof_ids(room or PROOF_TOKENS + 1)
            answers = [await self._ask(session, url, ids) for _ in range(2)]
            first, second = (checked_logprobs(answer, ids, self.rows, url)[0] for answer in answers)
            if difference := differing_token(answers[0], ids, self.tokenizer):
                raise TeacherError(f"teacher.url={url} has another vocabulary: {difference}")
            self._compare(first, second, f"{url} scores the same ids twice")
            self._compare(first, self.proof, f"{url} and the servers proved before it score ids")
            self.proof = first if self.proof is None else self.proof
            self.proved.add(url)

    def _proof_ids(self, room: int) -> list[int]:
        """Ids from the whole vocabulary, and the teacher's end."""
        run = self.run
        spread = np.linspace(0, run.vocab - 1, max(min(PROOF_TOKENS, room - 1) - 1, 2)).astype(int)
        ids = [id for id in spread.tolist() if id not in run.missing]
        return [*ids, self.tokenizer.eos_token_id]

    def _compare(self, first: np.ndarray, second: np.ndarray | None, what: str) -> None:
        """Raises TeacherError: two scores of the same ids differ."""
        if second is None:
            return
        dtype = self.section.dtype
        # Equal infinities have no difference.
        gaps = np.abs(first - second, where=first != second, out=np.zeros_like(first))
        gap = gaps.max() if dtype == "float32" else gaps.mean()
        if not gap <= ALIKE[dtype]:
            raise TeacherError(
                f"teacher.url={what} {gap:.2g} nats apart, more than {ALIKE[dtype]:g}; serve the "
                "same weights everywhere, without cached log-probs, and set teacher.dtype to the "
                "servers' own"
            )

    async def _logprobs(self, session: httpx.AsyncClient, url: str, ids: list[int]) -> np.ndarray:
        return checked_logprobs(await self._ask(session, url, ids), ids, self.rows, url)

    async def _ask(self, session: httpx.AsyncClient, url: str, ids: list[int]) -> Any:
        body = {
            "model": self.served[url],
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 1,
            "return_token_ids": True,
        }
        return await call(session, url, "/completions", body)
