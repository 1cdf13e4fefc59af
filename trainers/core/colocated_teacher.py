"""A teacher that vLLM runs beside this process, on the same device.

The engine has a process of its own (rollouts/engines/vllm_scorer.py). On a GPU it sleeps between
uses, with its weights on the CPU. Elsewhere it stays awake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from recipes.errors import ConfigError, ModelError, OnstreamError, TeacherError, one_line
from rollouts.engines.vllm_scorer import Scorer, ScorerProcess
from rollouts.pretrained import context_length
from rollouts.trajectory import Trajectory
from trainers.core.policy import DTYPES, check_model
from trainers.core.served_answers import sound_logprobs, write_logprobs
from trainers.core.served_requests import longest_sequence, scored_ids
from trainers.core.teacher import as_teacher_reads

NAMED = "teacher.engine=vllm"


class ColocatedTeacher:
    """Scores trajectories with vLLM. Each rank has an engine of its own.

    Args:
        section: `teacher`, with `engine=vllm`.
        run: a `Run` (trainers/run.py) with its device and prompts.

    Raises:
        OnstreamError: the engine does not start.
    """

    def __init__(self, section, run):
        self.run = run
        rollout = replace(
            run.config.rollout,
            gpu_memory_utilization=section.gpu_memory_utilization,
            cpu_kv_cache_gib=section.cpu_kv_cache_gib,
            sleep=True,
        )
        model = replace(run.config.model, trust_remote_code=section.trust_remote_code)
        config = replace(run.config, rollout=rollout, model=model)
        device = torch.device(run.device.type)
        arguments = section.path, config, device, DTYPES[section.dtype], room_for(run)
        try:
            self.engine = ScorerProcess(arguments, (run.vocab, tuple(run.missing)))
        except (ConfigError, ModelError):
            raise
        except OnstreamError as error:
            raise TeacherError(f"{NAMED}: {one_line(error)}; use teacher.engine=hf") from error

    def annotate(self, trajectories: Sequence[Trajectory], hidden: bool = False) -> None:
        """Write `teacher_logprobs` and `teacher_max_logprobs` [T] (float32, nats).

        Args:
            trajectories: with the annotation `teacher_targets`, the ids that are scored.
            hidden: must be false; vLLM gives no hidden states.

        Raises:
            TeacherError: the engine fails, or does not answer as it must.
        """
        if hidden:
            raise ConfigError(f"{NAMED} serves no hidden states")
        if self.run.device.type == "cuda":
            # The engine takes memory that this process has done with.
            torch.cuda.empty_cache()
        asked = [scored_ids(one) for one in as_teacher_reads(self.run, trajectories)]
        try:
            answers = self.engine.score(asked)
        except OnstreamError as error:
            raise TeacherError(
                f"{NAMED}: {one_line(error)}; resume the run, or use teacher.engine=hf"
            ) from error
        for trajectory, ids, answer in zip(trajectories, asked, answers, strict=True):
            write_logprobs(trajectory, sound_logprobs(*answer, ids, self.run.vocab, NAMED))


def room_for(run) -> int:
    """The tokens of the longest sequence, and the one that vLLM writes after it."""
    return longest_sequence(run) + 1


def check_colocated(section, run) -> None:
    """Refuse a model that vLLM computes otherwise, or sequences that it has no room for.

    Raises:
        ModelError: it says what differs.
    """
    _, model = check_model("teacher.path", section.path, section.trust_remote_code)
    room, context = room_for(run), context_length(model)
    if context and room > context:
        raise ModelError(
            f"{NAMED}: teacher.path={section.path} takes {context} tokens, and a sequence may have "
            f"{room - 1} and one more; lower rollout.max_new_tokens, or use teacher.engine=hf"
        )
    Scorer.check_model(section.path, model, room)
