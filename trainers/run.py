"""The run: one object with its config, its data and, once they are loaded, its models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rewards.functions import Functions
from rewards.verification import Verifier
from rollouts.data.examples import Ids, Prompt, PromptSampler
from rollouts.engines.base import Engine
from trainers.modes.plain import Plain


@dataclass(kw_only=True)
class Run:
    """What a method, an evaluation and the loop share.

    `trainers.prepare` fills what is known before a model loads; the loop adds the last section.
    What a run does not use stays None or empty.
    """

    # Typed by recipes/schema.
    config: Any
    # How sources are read (trainers/modes).
    mode: Plain
    # The trainer's class; None where nothing is trained.
    method: Any = None
    # The tokenizer and its ids.
    tokenizer: Any = None
    # Tokens that end a completion.
    stop_ids: tuple[int, ...] = ()
    # The teacher's own end token.
    teacher_stop: int | None = None
    # What the teacher's config states, in tokens.
    teacher_context: int | None = None
    # The prompts that the teacher reads in place of the student's, by index; empty: the same.
    teacher_prompts: dict[int, Ids] = field(default_factory=dict)
    # Both tokenizers, where the teacher reads its own tokens (trainers/core/retokenized.py).
    retokenizer: Any = None
    # Ids at and past it are padding rows of the heads.
    vocab: int = 0
    # Ids below it that no token has.
    missing: tuple[int, ...] = ()
    # Tokens that the method needs and the model has no rows for.
    new_tokens: list[str] = field(default_factory=list)
    # Training data.
    prompts: Sequence[Prompt] = ()
    sampler: PromptSampler | None = None
    verifier: Verifier | None = None
    # Rewards beside it, where the method reads any.
    functions: Functions | None = None
    # Evaluation data; `eval_name` is its name in the metrics.
    eval_name: str = ""
    eval_prompts: Sequence[Prompt] = ()
    eval_dropped: int = 0
    # The longest sequence that the run may make, in tokens.
    max_length: int = 0
    # The run directory, the checkpoint to continue from, and the steps already done.
    directory: Path = Path()
    checkpoint: Path | None = None
    start: int = 0
    # What must agree at a resume, by name.
    facts: dict[str, Any] = field(default_factory=dict)
    # Remarks that are printed when the run starts.
    messages: list[str] = field(default_factory=list)
    # Loaded by the loop.
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rollout: Engine | None = None
    teacher: Any = None
    # Prints a line on rank 0.
    say: Callable[[str], None] = print
    # Writes log-probs under the current weights (`Loop.score_policy`).
    score_policy: Callable[..., None] | None = None
    # Writes annotations under the current weights (`Loop.write_scores`).
    write_scores: Callable[..., None] | None = None
    # The trained policy's head.
    policy_head: Any = None

    def place(self, directory: Path) -> None:
        """Set the run directory, in the config too."""
        self.directory = directory
        section = replace(self.config.run, dir=str(directory))
        self.config = self.mode.config = replace(self.config, run=section)
