"""ProactiveLLM (arXiv 2606.00523): a model learns to write from part of a source, taught by its own
view of the whole.

    L = w_b L_batch + w_s L_MSLM + lambda L_SPSD

L_batch is cross-entropy with the whole source in view; L_MSLM (mask-based streaming modelling)
cross-entropy where word t sees phi(t) units, phi drawn anew for each example and step
(rollouts/simultaneous/schedules.py); L_SPSD (synchronized privileged self-distillation) the KL of the second
view from the first, on the first's top-k tokens, the first being constant and of the same weights.
All are means over target tokens, each on its own count.

One forward is enough: the source never sees the target, so a sequence is [source | target | target
    … ], the targets
with the same positions and hidden from one another: the first with the whole source in view, one
more per schedule. Losses and gradients are those of a forward per view; the source is encoded once.
A view whose terms have weight 0 is left out, so that an ablation costs what it should.

There is no public code, and the paper's text was not at hand (methods.md, 5). Ours are: schedules
by word, not by token, as decision heads are asked at words; the end of a word counts with it;
lambda, and all [choice] there. Left out: the paper's audio backbone; a source of frames is read as
one of words is (rollouts/simultaneous/frames.py).

    torchrun --nproc_per_node=N train.py recipe=proactivellm model.path=DIR data.path=DATA
"""

from __future__ import annotations

import numpy as np

from recipes.errors import ConfigError
from rollouts.data.examples import Prompt
from rollouts.layout import from_visible
from rollouts.simultaneous.decision import check_heads
from rollouts.simultaneous.prompts import target_words
from rollouts.simultaneous.schedules import draw_schedule
from rollouts.trajectory import Trajectory, sample_seed
from trainers.base import Trainer, occurrences
from trainers.losses import Loss


class ProactiveLLM(Trainer):
    """The options are the config's section `proactive`."""

    samples = False
    learns = ("solution",)

    @classmethod
    def check(cls, config) -> None:
        options = config.proactive
        if config.streaming.layout != "scheduled":
            raise ConfigError(
                f"streaming.layout={config.streaming.layout}: recipe={config.recipe} needs scheduled"
            )
        if not (options.batch_weight or options.stream_weight or options.kl_weight):
            raise ConfigError(
                "proactive.batch_weight, stream_weight and kl_weight are all 0: nothing to learn"
            )
        if config.train.normalizer not in ("window_token_mean", "token_mean"):
            raise ConfigError(
                f"train.normalizer={config.train.normalizer}: recipe={config.recipe} has token_mean only"
            )
        check_heads(options)

    def draw(self, step: int) -> list[Trajectory]:
        indices = self.parts.sampler.indices(step)
        return [
            self.read(self.parts.prompts[index], step, occurrence)
            for index, occurrence in zip(indices, occurrences(indices))
        ]

    def read(self, prompt: Prompt, step: int, occurrence: int = 0) -> Trajectory:
        """The example with its views, and the weights of their tokens. `occurrence`: how often the
        step had it before."""
        options, solution = self.config.proactive, prompt.example.solution
        words = target_words(solution, self.parts.tokenizer)
        opening = [token for part in prompt.opening for token in part]
        target = [*opening, *(token for word in words for token in word)]
        ends = np.cumsum([len(segment) for segment in prompt.segments])
        units, lengths = len(ends) - 1, [len(word) for word in words]

        rng = np.random.default_rng(
            sample_seed(self.config.seed, step, prompt.index, occurrence, "schedule")
        )
        streams = options.schedules if options.stream_weight or options.kl_weight else 0
        batch = bool(options.batch_weight or options.kl_weight)
        schedules = [np.full(len(words), units)] * batch + [
            draw_schedule(rng, units, len(words), options.schedule) for _ in range(streams)
        ]
        read = [
            np.concatenate([np.zeros(len(opening), np.int64), np.repeat(phi, lengths)])
            for phi in schedules
        ]
        views = np.repeat(np.arange(len(schedules)), len(target))

        learned = np.tile(np.arange(len(target)) >= len(opening), len(schedules))
        streaming = views >= batch
        # The loop divides by all tokens that count; a term's mean is over one view's.
        share = np.where(
            streaming, options.stream_weight / max(streams, 1), options.batch_weight
        ) * len(schedules)
        made = Trajectory(
            prompt.index,
            0,
            list(prompt.token_ids),
            target * len(schedules),
            "stop",
            prompt=prompt.text,
            completion=solution,
            answer=prompt.example.answer,
            sampled=learned,
            frames=prompt.example.frames,
            layout=from_visible(
                int(ends[-1]),
                ends[np.concatenate(read)],
                self.config.streaming.target_offset,
                views,
            ),
        )
        made.annotations |= {"ce_weights": share.astype(np.float32), "whole_view": ~streaming}
        if batch and streams and options.kl_weight:
            made.annotations["teacher_distance"] = (views * len(target)).astype(np.int64)
            made.annotations["kl_weights"] = np.full(
                len(views), options.kl_weight * len(schedules) / streams, np.float32
            )
        return made

    def loss(self) -> Loss:
        options = self.config.proactive
        top_k = options.top_k if options.top_k < self.parts.vocab else None
        kind = {"top_k": top_k, "tail": options.top_k_tail, "divergence": "forward_kl"}
        return Loss(
            cross_entropy=True,
            self_distillation=kind if options.kl_weight else None,
            vocab=self.parts.vocab,
        )
