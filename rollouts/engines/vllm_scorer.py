"""A vLLM engine that scores given ids, in a process of its own beside the trainer's.

On a GPU vLLM lets one engine of a process sleep, and keeps its settings from the first engine on.
The rollout engine is in the trainer's process, so this one is not. The process ends when the
trainer closes its end of the pipe, or ends itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from recipes.errors import OnstreamError
from rollouts.engines.vllm import VllmEngine, last_line

# Of a score: the ids that were scored; each one's log-probs and ranks by id, or None.
Answer = tuple[list[int], list[dict[int, tuple[float, int]] | None]]
# Of torchrun, which the process is no rank of.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
# Tokens and sequences of a forward pass. It makes the logits [T, V] of each sequence in float32.
CHUNK, SEQUENCES = 2048, 64
# Seconds that the process gets to end by itself.
PATIENCE = 10.0


class Scorer(VllmEngine):
    """Scores prompts. `rollout` in its config has what is set for it."""

    setting = "teacher.engine"
    sleep_level = 1

    def own_options(self) -> dict:
        return {
            # A cached prefix has no log-probs.
            "enable_prefix_caching": False,
            "logprobs_mode": "raw_logprobs",
            # Nothing is decoded, so there is nothing for CUDA graphs to speed up.
            "enforce_eager": True,
            # No request has a seed, so a prompt may be split on a CPU too.
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": CHUNK,
            "max_num_seqs": SEQUENCES,
        }

    def score(self, ids: Sequence[list[int]]) -> list[Answer]:
        """The log-probs at temperature 1 of each list's ids but the first, and the likeliest's."""
        # vLLM writes one token at least. With 0 in place of 1 only the given id would be there.
        params = self.sampling_params(
            max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False
        )
        self.wake()
        outputs = self.llm.generate(
            [{"prompt_token_ids": one} for one in ids], params, use_tqdm=False
        )
        self.sleep()
        return [_answer(output) for output in outputs]


def _answer(output) -> Answer:
    """What is in vLLM's RequestOutput."""
    entries = [
        entry and {id: (token.logprob, token.rank) for id, token in entry.items()}
        for entry in output.prompt_logprobs
    ]
    return list(output.prompt_token_ids), entries


class ScorerProcess:
    """The trainer's end of a `Scorer`. It returns when the engine is loaded.

    Args:
        arguments: of `Scorer`.
        vocabulary: of its method `limit_vocabulary`.

    Raises:
        OnstreamError: the engine does not start.
    """

    def __init__(self, arguments: tuple[Any, ...], vocabulary: tuple[int, tuple[int, ...]]):
        ours, theirs = socket.socketpair()
        with theirs:
            module = "rollouts.engines.vllm_scorer"
            self.process = subprocess.Popen(
                # The trainer has warned of what there is to warn of.
                [sys.executable, "-W", "ignore", "-m", module, str(theirs.fileno())],
                env=_environment(),
                pass_fds=[theirs.fileno()],
            )
        self.connection = Connection(ours.detach())
        self.close = weakref.finalize(self, _end, self.connection, self.process)
        self._ask((arguments, vocabulary))

    def score(self, ids: Sequence[list[int]]) -> list[Answer]:
        """As `Scorer.score`.

        Raises:
            OnstreamError: the process has ended, or vLLM fails.
        """
        return self._ask(ids)

    def _ask(self, question: Any) -> Any:
        try:
            self.connection.send(question)
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.close()
            status = self.process.returncode
            raise OnstreamError(f"vLLM's process has ended with status {status}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _environment() -> dict[str, str]:
    """The process's variables: this project on its path, one GPU, and no rank."""
    variables = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        seen = variables.get("CUDA_VISIBLE_DEVICES")
        variables["CUDA_VISIBLE_DEVICES"] = seen.split(",")[device] if seen else str(device)
    return variables


def _end(connection: Connection, process: subprocess.Popen) -> None:
    connection.close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# The process's side


def _serve(connection: Connection) -> None:
    """Answer questions until the trainer is gone."""
    # The trainer ends its step first, and then this process.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    arguments, vocabulary = connection.recv()
    try:
        scorer = Scorer(*arguments)
        scorer.limit_vocabulary(*vocabulary)
        scorer.sleep()
        answer = None
        while True:
            connection.send(answer)
            answer = scorer.score(connection.recv())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except OnstreamError as error:
        connection.send(error)
    except Exception as error:
        connection.send(OnstreamError(last_line(error)))
    # Without vLLM's own farewells.
    os._exit(0)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
