"""ProactiveLLM (arXiv 2606.00523): a model learns to write from part of a source, taught by its own
view of the whole.

    L = w_b L_batch + w_s L_MSLM + lambda L_SPSD

- L_batch is cross-entropy with the whole source in view.
- L_MSLM (mask-based streaming modelling) is cross-entropy where word t sees phi(t) units. phi is
  drawn anew for each example and step (rollouts/simultaneous/schedules.py).
- L_SPSD (synchronized privileged self-distillation) is the KL of the second view from the first, on
  the first's top-k tokens. The first view is constant and of the same weights.

All are means over target tokens, each on its own count.

One forward is enough. The source never sees the target, so a sequence is [source | target | target
…], the targets with the same positions and hidden from one another: the first with the whole source
in view, one more per schedule. Losses and gradients are those of a forward per view; the source is
encoded once. A view whose terms have weight 0 is left out, so that an ablation costs what it
should.

We found no code for it, and the paper's text was not at hand (docs/specification.md, 5). Ours are:
schedules by word, not by token, as decision heads are asked at words; the end of a word counts with
it; lambda, and all [choice] there. Left out: the paper's audio backbone; a source of frames is read
as one of words is (rollouts/simultaneous/frames.py).

    torchrun --nproc_per_node=N train.py recipe=proactivellm model.path=MODEL_DIR data.path=DATA
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from recipes.errors import ConfigError
from rollouts.data.examples import Prompt
from rollouts.layout import from_visible
from rollouts.simultaneous.decision import check_heads
from rollouts.simultaneous.prompts import target_cut, target_words
from rollouts.simultaneous.schedules import draw_schedule
from rollouts.trajectory import Trajectory, sample_seed
from trainers.base import Trainer, occurrences
from trainers.losses import Loss
from trainers.run import Run


class ProactiveLLM(Trainer):
    """The options are the config's section `proactive`."""

    samples = False
    layouts = ("scheduled",)
    learns = ("solution",)

    @classmethod
    def check(cls, config) -> None:
        options = config.proactive
        if not (options.batch_weight or options.stream_weight or options.kl_weight):
            raise ConfigError(
                "proactive.batch_weight, stream_weight and kl_weight are all 0: nothing to learn"
            )
        if config.train.normalizer != "token_mean":
            raise ConfigError(
                f"train.normalizer={config.train.normalizer}: recipe={config.recipe} has "
                "token_mean only"
            )
        check_heads(options)

    @classmethod
    def target_length(cls, prompt: Prompt, run: Run) -> int:
        words = target_words(prompt.example.solution, run.tokenizer, target_cut(run.config))
        return sum(map(len, words))

    def draw(self, step: int) -> list[Trajectory]:
        indices = self.run.sampler.indices(step)
        return [
            self.read(self.run.prompts[index], step, occurrence)
            for index, occurrence in zip(indices, occurrences(indices))
        ]

    def read(self, prompt: Prompt, step: int, occurrence: int = 0) -> Trajectory:
        """The example with its views, and the weights of their tokens.

        Args:
            prompt: with `segments` (frame, unit 1, …, unit M) and an opening.
            step: counts from 0.
            occurrence: how often the step had the prompt before.
        """
        words = target_words(prompt.example.solution, self.run.tokenizer, target_cut(self.config))
        opening = [token for part in prompt.opening for token in part]
        target = [*opening, *(token for word in words for token in word)]
        # Source tokens that are read after so many units.
        ends = np.cumsum([len(segment) for segment in prompt.segments])
        schedules = self.draw_schedules(prompt, len(words), step, occurrence)
        # Units read when each token is written: none for the opening, a word's for all its tokens.
        word_lengths, forced = [len(word) for word in words], np.zeros(len(opening), np.int64)
        units_read = [np.concatenate([forced, np.repeat(phi, word_lengths)]) for phi in schedules]
        view = np.repeat(np.arange(len(schedules)), len(target))
        trajectory = Trajectory(
            prompt.index,
            0,
            list(prompt.token_ids),
            target * len(schedules),
            "stop",
            prompt=prompt.text,
            completion=prompt.example.solution,
            answer=prompt.example.answer,
            sampled=np.tile(np.arange(len(target)) >= len(opening), len(schedules)),
            frames=prompt.example.frames,
            layout=from_visible(
                int(ends[-1]),
                ends[np.concatenate(units_read)],
                self.config.streaming.target_offset,
                view,
            ),
        )
        self.weigh(trajectory, view, len(target))
        return trajectory

    def views(self) -> tuple[bool, int]:
        """Whether there is a view of the whole source, and the number of views of a part."""
        options = self.config.proactive
        whole = bool(options.batch_weight or options.kl_weight)
        partial = options.schedules if options.stream_weight or options.kl_weight else 0
        return whole, partial

    def draw_schedules(
        self, prompt: Prompt, words: int, step: int, occurrence: int
    ) -> list[np.ndarray]:
        """phi [words] of each view: the units read when each word is written."""
        whole, partial = self.views()
        units = len(prompt.segments) - 1
        seed = sample_seed(self.config.seed, step, prompt.index, occurrence, "schedule")
        rng = np.random.default_rng(seed)
        kind = self.config.proactive.schedule
        schedules = [np.full(words, units)] if whole else []
        return schedules + [draw_schedule(rng, units, words, kind) for _ in range(partial)]

    def weigh(self, trajectory: Trajectory, view: np.ndarray, target_length: int) -> None:
        """Write the annotations of a trajectory whose tokens are of these views [T]."""
        options, (whole, partial) = self.config.proactive, self.views()
        count = whole + partial
        in_part = view >= whole
        # The loop divides by all tokens that count; a term's mean is over one view's.
        stream_weight = options.stream_weight / max(partial, 1)
        weights = np.where(in_part, stream_weight, options.batch_weight) * count
        annotations = {"ce_weights": weights.astype(np.float32), "whole_view": ~in_part}
        if whole and partial and options.kl_weight:
            kl_weight = options.kl_weight * count / partial
            annotations["kl_weights"] = np.full(len(view), kl_weight, np.float32)
            # The same token in the first view is its teacher.
            annotations["teacher_distance"] = (view * target_length).astype(np.int64)
        trajectory.annotations |= annotations

    def token_metrics(
        self, trajectory: Trajectory, output: Mapping[str, np.ndarray]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        annotations = trajectory.annotations
        mask, whole = annotations["mask"], annotations["whole_view"]
        nll = -output["logprobs"]
        means = {"nll/batch": (nll, mask & whole), "nll/stream": (nll, mask & ~whole)}
        if "teacher_distance" in annotations:
            taught = mask & (annotations["teacher_distance"] > 0)
            means["teacher/kl"] = (output["divergence"], taught)
        return means

    def after_training(self) -> None:
        """Sweep the decision heads of `proactive.curve`, on the evaluation data."""
        if self.config.proactive.curve and self.run.eval_prompts:
            from trainers.evaluation import evaluate
            from trainers.modes.curves import write_curves

            run, heads = self.run, self.config.proactive.curve
            step = f"step_{self.config.train.steps}"
            model = run.directory / "checkpoints" / step / "model"
            write_curves(run, heads, run.directory / "curves.json", model, evaluate)

    def loss(self) -> Loss:
        options = self.config.proactive
        top_k = options.top_k if options.top_k < self.run.vocab else None
        kind = {"top_k": top_k, "tail": options.top_k_tail, "divergence": "forward_kl"}
        return Loss(
            cross_entropy=True,
            self_distillation=kind if options.kl_weight else None,
            vocab=self.run.vocab,
        )
