"""Frozen models that score completions in the trainer's process: a teacher or a reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from rollouts.trajectory import Trajectory
from trainers.core.batching import make_microbatches, pack, unpack
from trainers.core.policy import DTYPES, load_policy
from trainers.core.resting import Resting
from trainers.core.scoring import score_tokens

# The value of `teacher.path` for a student that teaches itself.
SELF = "self"


class FrozenModel:
    """Runs over trajectories in packed micro-batches of the same token budget as the update's.

    Args:
        model: the section of a config that names it: `model` or `teacher`.
        run: a `Run` (trainers/run.py) with its device.
    """

    # Entered while the model runs; it may bring the weights to the device.
    resting: contextlib.AbstractContextManager = contextlib.nullcontext()

    def __init__(self, model, run):
        self.config, self.device, self.vocab = run.config, run.device, run.vocab
        policy = load_policy(
            model.path,
            DTYPES[model.dtype],
            run.device,
            run.config.model.attn_implementation,
            masked=run.mode.masked,
            missing=run.missing,
            trust_remote_code=model.trust_remote_code,
        )
        self.policy = policy.eval().requires_grad_(False)

    @torch.no_grad()
    def write(self, trajectories: Sequence[Trajectory], function: Callable) -> None:
        """Write annotations.

        Args:
            trajectories: get the annotations.
            function: maps (hidden [T, H], the `MicroBatch`) to each name's values [T, …].
        """
        lengths = [trajectory.length for trajectory in trajectories]
        with self.resting:
            for members in make_microbatches(lengths, self.config.train.tokens_per_microbatch):
                batch = pack(trajectories, members, self.device)
                values = function(self.policy.hidden(batch), batch)
                for name, tensor in values.items():
                    arrays = unpack(batch, trajectories, tensor)
                    for member, array in zip(members, arrays):
                        trajectories[member].annotations[name] = array

    def score(self, hidden: torch.Tensor, targets: torch.Tensor):
        """Log-probs of `targets` and of the most likely tokens [T] in nats.

        They are at the sampling temperature.

        Args:
            hidden: [T, H].
            targets: [T] int64.
        """
        return score_tokens(
            self.policy.head,
            hidden,
            targets=targets,
            temperature=self.config.rollout.temperature,
            vocab=self.vocab,
        )


class Teacher(FrozenModel):
    """A section's `path`; for `self`, the weights that the run started from.

    Args:
        section: `teacher`, or one like it.
        run: a `Run` with its device.
    """

    def __init__(self, section, run):
        super().__init__(resolved(section, run.config.model), run)
        self.run = run
        if section.rest:
            # The update reads the head of an objective that compares whole distributions.
            full = run.config.objective != "policy_gradient"
            self.resting = Resting(self.policy, run.device, self.head.tensors() if full else ())

    @property
    def head(self):
        """The teacher's head (weight [V, H_teacher])."""
        return self.policy.head

    def annotate(self, trajectories: Sequence[Trajectory], hidden: bool = False) -> None:
        """Write `teacher_logprobs` and `teacher_max_logprobs` [T] (float32, nats).

        Args:
            trajectories: with the annotation `teacher_targets`, the ids that are scored.
            hidden: also write `teacher_hidden` [T, H_teacher] float32. The head makes the full
                distribution of it, which is V/H times as large.
        """
        score = scorer(self.run, hidden)
        self.write(as_teacher_reads(self.run, trajectories), partial(score, self.head))


class SelfTeacher:
    """The trained policy itself: this step's weights, or those without LoRA's adapters.

    It takes no memory of its own. It sees more than the policy does (`teacher.prompt`).

    Args:
        run: a `Run` whose policy is loaded.
    """

    def __init__(self, run):
        self.run = run
        self.adapters = run.config.teacher.weights == "current"

    @property
    def head(self):
        """The policy's head, which learns nothing as a teacher."""
        return DetachedHead(self.run.policy_head)

    def annotate(self, trajectories: Sequence[Trajectory], hidden: bool = False) -> None:
        """As `Teacher.annotate`. A collective."""
        read = as_teacher_reads(self.run, trajectories)
        self.run.write_scores(read, scorer(self.run, hidden), self.adapters)


class DetachedHead:
    """A head as a constant. Its weight is looked up each time, as ZeRO-3 moves it about."""

    def __init__(self, head):
        self.of = head
        self.softcap = head.softcap

    @property
    def weight(self) -> torch.Tensor:
        return self.of.weight.detach()

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.of.bias is None else self.of.bias.detach()


def resolved(section, model):
    """A teacher's section, which names the student's model where that teaches itself.

    Args:
        model: the section `model`.
    """
    if section.path != SELF:
        return section
    return replace(section, path=model.path, trust_remote_code=model.trust_remote_code)


def as_teacher_reads(run, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The trajectories after the prompts that the teacher reads; annotations are shared.

    The completion's ids are the student's. Their places differ by the difference of the prompts.
    """
    prompts = run.teacher_prompts
    return [
        replace(t, prompt_ids=list(prompts[t.prompt_index])) if prompts else t for t in trajectories
    ]


def scorer(run, hidden: bool) -> Callable:
    """What maps a head, hidden states [T, H] and their `MicroBatch` to a teacher's annotations."""

    def score(head, states: torch.Tensor, batch) -> dict[str, torch.Tensor]:
        scored = score_tokens(
            head,
            states,
            targets=batch.annotations["teacher_targets"],
            temperature=run.config.rollout.temperature,
            vocab=run.vocab,
        )
        annotations = {
            "teacher_logprobs": scored.logprobs,
            "teacher_max_logprobs": scored.max_logprob,
        }
        if hidden:
            annotations["teacher_hidden"] = states.detach().float()
        return annotations

    return score


class AdapterlessPolicy:
    """The weights that a LoRA run started from: the policy's own, without the adapters.

    Args:
        run: a `Run` whose policy has adapters.
    """

    def __init__(self, run):
        self.run = run

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        """Write `reference_logprobs` [T] (float32, nats), of the sampled tokens. A collective."""
        self.run.score_policy(trajectories, name="reference_logprobs", adapters=False)


class Reference(FrozenModel):
    """The weights that a run started from, also after a resume: `model.path` in `model.dtype`."""

    def __init__(self, run):
        super().__init__(run.config.model, run)

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        """Write `reference_logprobs` [T] (float32, nats), of the sampled tokens."""

        def values(states: torch.Tensor, batch) -> dict[str, torch.Tensor]:
            scored = self.score(states, batch.targets)
            return {"reference_logprobs": scored.logprobs}

        self.write(trajectories, values)
