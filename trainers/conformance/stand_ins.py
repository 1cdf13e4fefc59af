"""What stands in for a tokenizer, a loaded teacher and a sampler."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from rollouts.trajectory import Annotations, Request, Sampling, Trajectory
from trainers.conformance.world import STOP, TEXTS, Completion, TinyPolicy
from trainers.core.teacher import Teacher
from trainers.run import Run

CPU = torch.device("cpu")


class ExactAnnotations(Annotations):
    """Annotations that keep float64 where training has float32."""

    def __setitem__(self, name: str, values: np.ndarray) -> None:
        if values.dtype != np.float64:
            return super().__setitem__(name, values)
        # What is checked is the name.
        super().__setitem__(name, values.astype(np.float32))
        return dict.__setitem__(self, name, values)


class Words:
    """A tokenizer with one token per text of a list; id 0 is its end token."""

    eos_token_id = STOP
    bos_token_id = None
    name_or_path = "conformance"

    def __init__(self, texts: Sequence[str] = TEXTS):
        self.texts = list(texts)

    def get_vocab(self) -> dict[str, int]:
        return {text: token for token, text in enumerate(self.texts)}

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]:
        return [self.texts.index(token) for token in tokens]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.texts[token] for token in ids)

    def __call__(self, texts: str | Sequence[str], add_special_tokens: bool = False) -> Any:
        one = isinstance(texts, str)
        ids = [self._ids(text) for text in ([texts] if one else texts)]
        return type("Encoding", (), {"input_ids": ids[0] if one else ids})

    def _ids(self, text: str) -> list[int]:
        ids = []
        while text:
            fitting = [token for token in self.texts if text.startswith(token)]
            ids.append(self.texts.index(max(fitting, key=len)))
            text = text[len(self.texts[ids[-1]]) :]
        return ids


class TinyTeacher(Teacher):
    """The trainer's teacher with a tiny policy in place of a loaded model.

    Args:
        run: of the student.
        policy: the teacher's.
        shift: move what it says of each token to so many tokens later, which is a mistake.
    """

    def __init__(self, run: Run, policy: TinyPolicy, shift: int = 0):
        self.config, self.device, self.vocab, self.policy = run.config, CPU, run.vocab, policy
        self.run, self.shift = run, shift

    def annotate(self, trajectories: Sequence[Trajectory], hidden: bool = False) -> None:
        super().annotate(trajectories, hidden)
        for trajectory in trajectories if self.shift else ():
            for name in ("teacher_logprobs", "teacher_hidden"):
                if name in trajectory.annotations:
                    values = trajectory.annotations[name]
                    trajectory.annotations[name] = np.roll(values, self.shift, axis=0)


class Planned:
    """A rollout engine that returns given completions, with the log-probs of its policy."""

    def __init__(self, policy: TinyPolicy):
        self.policy = policy
        self.known: dict[tuple[tuple[int, ...], float], torch.Tensor] = {}
        # By prompt, the completions that its samples are.
        self.plan: dict[int, Sequence[Completion]] = {}
        # Trajectories to return in place of the plan.
        self.given: list[Trajectory] = []
        # What the trainer asked for last.
        self.sampling: Sampling | None = None

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling, **_) -> list[Trajectory]:
        self.sampling = sampling
        if self.given:
            return copy.deepcopy(self.given)
        return [self._trajectory(request, sampling) for request in requests]

    def _trajectory(self, request: Request, sampling: Sampling) -> Trajectory:
        completion = self.plan[request.prompt_index][request.sample_index]
        prompt = list(request.prompt_ids)
        logprobs = [
            float(self._log_probs((*prompt, *completion.ids[:end]), sampling.temperature)[token])
            for end, token in enumerate(completion.ids)
        ]
        return Trajectory(
            request.prompt_index,
            request.sample_index,
            prompt,
            list(completion.ids),
            completion.finish_reason,
            logprobs=np.array(logprobs),
            annotations=ExactAnnotations(),
        )

    def _log_probs(self, ids: tuple[int, ...], temperature: float) -> torch.Tensor:
        """[V], of the token after `ids`. They are kept: the policy does not change."""
        key = ids, temperature
        if key not in self.known:
            self.known[key] = (self.policy.logits(ids) / temperature).log_softmax(-1)
        return self.known[key]
