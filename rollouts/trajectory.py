"""The record that every method shares: one prompt, one completion, and what is known of its
tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from recipes.errors import AnnotationError
from recipes.registry import nearest
from rollouts.layout import Layout


@dataclass(frozen=True)
class Annotation:
    """What one annotation is: [T] unless its meaning says otherwise."""

    dtype: str
    meaning: str
    writers: str
    readers: str


# Log-probs are in nats. `loop`: trainers/loop.py; `loss`: trainers/losses.py; `stats`:
# trainers/core/metrics.py; methods by the names of their files.
ANNOTATIONS = {
    "mask": Annotation(
        "bool", "The token counts in the loss.", "every method", "loss, loop, stats"
    ),
    "candidates": Annotation(
        "bool", "The token could have been selected to learn from.", "opd", "stats"
    ),
    "targets": Annotation(
        "int64", "The id that the policy scores, where it is not the sampled one.", "opd", "loss"
    ),
    "teacher_targets": Annotation("int64", "The id that the teacher scores.", "opd", "the teacher"),
    "teacher_logprobs": Annotation(
        "float32", "The teacher's log-prob of `teacher_targets`.", "the teacher", "loss, stats"
    ),
    "teacher_max_logprobs": Annotation(
        "float32", "The teacher's log-prob of its most likely token.", "the teacher", "stats"
    ),
    "each_teacher_logprobs": Annotation(
        "float32",
        "[T, K]: the log-prob of each of the teachers whose rewards are averaged.",
        "the teachers",
        "loss, opd",
    ),
    "spans": Annotation(
        "int64",
        "The span of tokens that has the bytes of some of the teacher's; -1: the token is in none.",
        "a teacher with another tokenizer",
        "opd, its metrics",
    ),
    "span_teacher_logprobs": Annotation(
        "float32", "The teacher's log-prob of the token's span.", "that teacher", "opd"
    ),
    "span_student_logprobs": Annotation(
        "float32", "The policy's log-prob of the token's span before the update.", "opd", "opd"
    ),
    "teacher_topk_ids": Annotation(
        "int64", "[T, K]: the teacher's most likely tokens.", "the cached teacher", "loss"
    ),
    "teacher_topk_logprobs": Annotation(
        "float32", "[T, K]: the teacher's log-probs of them.", "the cached teacher", "loss"
    ),
    "teacher_hidden": Annotation(
        "float32", "[T, H_teacher]: the teacher's last hidden state.", "the teacher", "loss"
    ),
    "student_logprobs": Annotation(
        "float32",
        "The policy's log-prob before the update.",
        "the loop's score_policy",
        "opd, grpo",
    ),
    "old_logprobs": Annotation(
        "float32", "The policy's log-prob before the step's first update.", "grpo", "loss, stats"
    ),
    "rollout_logprobs": Annotation(
        "float32", "The sampler's log-prob, for the importance weight.", "grpo, opd", "loss"
    ),
    "reference_logprobs": Annotation(
        "float32", "The starting weights' log-prob.", "the reference", "loss"
    ),
    "advantages": Annotation("float32", "Added to the token reward.", "grpo, hrpo, opd", "loss"),
    "task_advantages": Annotation(
        "float32", "The verifier's part of `advantages`.", "opd", "its metrics"
    ),
    "rewards": Annotation(
        "float32", "Token reward plus advantage, as it was used.", "the loop", "completions.jsonl"
    ),
    "weights": Annotation(
        "float32", "Weight of the token's loss; 1 without it.", "the loop", "loss"
    ),
    "ce_weights": Annotation(
        "float32", "Weight of the token's cross-entropy.", "sft and its kin", "loss"
    ),
    "kl_weights": Annotation(
        "float32", "Weight of the token's self-distillation.", "proactivellm", "loss"
    ),
    "teacher_distance": Annotation(
        "int64",
        "d > 0: the hidden state d positions earlier teaches the token; 0: none does.",
        "proactivellm",
        "loss",
    ),
    "whole_view": Annotation(
        "bool",
        "The token was written with the whole source in view.",
        "proactivellm",
        "its metrics",
    ),
}


class Annotations(dict[str, np.ndarray]):
    """A trajectory's annotations by name, as `ANNOTATIONS` lists them.

    Raises:
        AnnotationError: the name is not in the table, or the array has another dtype.
    """

    def __setitem__(self, name: str, values: np.ndarray) -> None:
        if name not in ANNOTATIONS:
            raise AnnotationError(
                f"there is no annotation '{name}'{nearest(name, ANNOTATIONS)}; "
                "rollouts/trajectory.py lists them"
            )
        if str(values.dtype) != ANNOTATIONS[name].dtype:
            raise AnnotationError(
                f"annotation '{name}' must be {ANNOTATIONS[name].dtype}, it is {values.dtype}"
            )
        super().__setitem__(name, values)

    def update(self, values: Mapping[str, np.ndarray]) -> None:  # type: ignore[override]
        for name, array in values.items():
            self[name] = array

    def __ior__(self, values: Mapping[str, np.ndarray]) -> Annotations:  # type: ignore[override]
        self.update(values)
        return self


@dataclass
class Trajectory:
    """One prompt with one completion.

    Arrays have one entry per completion token; log-probs are float32 in nats.

    Raises:
        AnnotationError: an array has another length, or there is no prompt, whose last token
            predicts the first of the completion.
    """

    prompt_index: int  # the row of the dataset
    sample_index: int  # 0 .. samples_per_prompt - 1
    prompt_ids: list[int]
    completion_ids: list[int]  # with the stop token, where generation ended on one
    finish_reason: str  # "stop": the last token is a stop token; "length": cut at max_new_tokens
    logprobs: np.ndarray | None = None  # the sampler's own, of the sampled tokens
    prompt: str = ""
    completion: str = ""  # text, without the stop token
    answer: str | None = None
    score: float | None = None  # the verifier's, 0 to 1
    timed_out: bool = False  # the verifier did not end in time, so the score may be too low
    # of reward.functions by name; and why one is its default
    functions: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    reward: float | None = None  # what the method makes of the whole completion
    padding: bool = False  # stands in on a rank that has no other; its tokens do not count
    # Streaming (rollouts/layout.py).
    layout: Layout | None = None  # None: plain causal, natural positions
    # bool; False: forced protocol tokens, and interleaved source. None: all are
    sampled: np.ndarray | None = None
    # int; the thought a token is of, 0 .. N - 1; N: deep reasoning and answer; else -1
    slots: np.ndarray | None = None
    # [F, D], of a source with FRAME in `prompt_ids` (rollouts/simultaneous/frames.py)
    frames: np.ndarray | None = None
    # int; simultaneous: source units read when it was written, 0 for the opening
    reads: np.ndarray | None = None
    # Annotations: what a trainer says about the tokens, for the loss primitives
    # (trainers/losses.py).
    annotations: Annotations = field(default_factory=Annotations)

    def __post_init__(self) -> None:
        place, count = f"prompt {self.prompt_index}", len(self.completion_ids)
        if not self.prompt_ids:
            raise AnnotationError(f"{place}: a trajectory without a prompt; give it one token")
        for name in ("logprobs", "sampled", "slots", "reads"):
            array = getattr(self, name)
            if array is not None and len(array) != count:
                raise AnnotationError(
                    f"{place}: `{name}` has {len(array)} entries for {count} completion tokens"
                )

    @property
    def length(self) -> int:
        """Prompt and completion, in tokens."""
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def token_ids(self) -> list[int]:
        return [*self.prompt_ids, *self.completion_ids]

    @property
    def sampled_mask(self) -> np.ndarray:
        """[T] bool, a copy: the completion tokens that the policy chose.

        Of a sequence that stands in there are none, so that no statistic counts it twice.
        """
        if self.padding or self.sampled is None:
            return np.full(len(self.completion_ids), not self.padding)
        return self.sampled.copy()


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `temperature` 0 is greedy; `top_k` -1 and `top_p` 1 truncate
    nothing."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_ids: tuple[int, ...] = ()
    # Only ids below it are drawn: rows of the head past it are padding. None: all.
    vocab: int | None = None
    # Ids below it that no token has. They are not drawn either.
    missing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Request:
    """One completion to draw."""

    prompt_index: int
    sample_index: int
    prompt_ids: tuple[int, ...]
    seed: int
    # Streaming: the source in segments, of which `prompt_ids` is the concatenation, and the forced
    # target segments before the first thought. Segments beyond those of the opening are sentences,
    # with a thought each.
    segments: tuple[tuple[int, ...], ...] = ()
    opening: tuple[tuple[int, ...], ...] = ()
    frames: np.ndarray | None = None  # [F, D], of a source with FRAME in `prompt_ids`

    @property
    def thoughts(self) -> int:
        """N, the number of sentences."""
        return max(len(self.segments) - len(self.opening), 0)


def sample_seed(
    run_seed: int, step: int, prompt_index: int, sample_index: int, purpose: str = "train"
) -> int:
    """The seed of one completion, 63 bits: the same whatever rank or batch draws it."""
    text = f"{run_seed}/{purpose}/{step}/{prompt_index}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
