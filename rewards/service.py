"""Scores of a reward service, over HTTP.

    POST {"completions": […], "prompts": […], "answers": […], "kwargs": {…}}
    200  {"scores": […]}

`kwargs` is there if the config gives any. An answer is null where the row has none. A score is a
number, or null where the service has none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

# Seconds before a request is repeated: at first, and at most.
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0
# Of a status that says "later". So do all from 500.
BUSY = (408, 425, 429)
# Bytes for each completion that an answer may have, and for all together.
BYTES_EACH, BYTES = 1 << 10, 1 << 16


class ServiceError(Exception):
    """The service does not answer as it should."""


class LaterError(ServiceError):
    """It may answer if it is asked again."""


class Service:
    """Asks a service for the scores of a batch.

    Requests that fail for now are repeated, after ever longer waits, until the batch's seconds are
    over: no connection, no answer in time, or a status that says "later". Any other answer that is
    not as it should be is final.

    Args:
        url: http or https.
        size: completions in a request; None: all.
        kwargs: sent along.
    """

    def __init__(self, url: str, size: int | None, kwargs: Mapping[str, Any]):
        self.url, self.size, self.kwargs = url, size, dict(kwargs)
        self.client: Any = None

    def __call__(
        self,
        completions: Sequence[str],
        answers: Sequence[str | None],
        prompts: Sequence[str],
        seconds: float,
    ) -> list[Any]:
        """A score for each completion; None, or the error, where there is none."""
        deadline = time.monotonic() + seconds
        size, scores = self.size or max(len(completions), 1), []
        for start in range(0, len(completions), size):
            part = slice(start, start + size)
            body: dict[str, Any] = {
                "completions": list(completions[part]),
                "prompts": list(prompts[part]),
                "answers": list(answers[part]),
            }
            if self.kwargs:
                body["kwargs"] = self.kwargs
            count = len(body["completions"])
            try:
                scores += self._asked(body, count, deadline)
            except Exception as error:  # the others have their scores
                scores += [error] * count
        return scores

    def _asked(self, body: dict[str, Any], count: int, deadline: float) -> list[Any]:
        """The scores of one request, which is repeated until the deadline."""
        from tenacity import Retrying, retry_if_exception_type, stop_before_delay
        from tenacity.wait import wait_exponential_jitter

        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the requests before it took all the time")
        again = Retrying(
            stop=stop_before_delay(left),
            wait=wait_exponential_jitter(initial=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT),
            retry=retry_if_exception_type(LaterError),
            reraise=True,
        )
        return again(self._post, json.dumps(body).encode(), count, deadline)

    def _post(self, body: bytes, count: int, deadline: float) -> list[Any]:
        import httpx

        if self.client is None:
            self.client = httpx.Client(headers={"Content-Type": "application/json"})
        left = max(deadline - time.monotonic(), 0.001)
        try:
            with self.client.stream("POST", self.url, content=body, timeout=left) as response:
                text = _read(response, BYTES + BYTES_EACH * count, deadline)
        except httpx.TransportError as error:
            raise LaterError(f"{type(error).__name__}: {error}") from error
        if response.status_code in BUSY or response.status_code >= 500:
            raise LaterError(f"status {response.status_code}")
        if response.status_code != 200:
            raise ServiceError(f"status {response.status_code}: {_begin(text)}")
        return _scores(text, count)


def _read(response: Any, most: int, deadline: float) -> bytes:
    """The body of an answer, of so many bytes at most, which has come before the deadline."""
    body = bytearray()
    for part in response.iter_bytes():
        body += part
        if len(body) > most:
            raise ServiceError(f"the answer has more than {most} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError("the answer was not whole in time")
    return bytes(body)


def _scores(text: bytes, count: int) -> list[Any]:
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        raise ServiceError(f"the answer is no JSON: {_begin(text)}") from None
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise ServiceError(f"the answer has no list of scores: {_begin(text)}")
    if len(scores) != count:
        raise ServiceError(f"{len(scores)} scores for {count} completions")
    return scores


def _begin(text: bytes) -> str:
    return repr(text[:60].decode(errors="replace"))
