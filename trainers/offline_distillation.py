"""Off-policy distillation from a cache: the forward KL to a teacher that scored the data before.

The sequences are those of `recipe=sft`: a prompt and its solution, which nobody samples. At each
token y_t of a solution, with the teacher's p and the student's q at temperature 1,

    L = mean_t  sum_{v in S_t} p_v log(p_v / q_v) + p_R log(p_R / q_R)

S_t are the K tokens that the cache has there, and R is the bucket of all others: p_R = 1 - sum of
the p_v. With S_t the whole vocabulary it is KL(p || q). With fewer tokens it is a lower bound of
that, which is 0 where both agree on S_t. A cache without top-k (`top_k=0`) has S_t = {y_t}, the
token of the data. The end token does not count there, if the teacher ends on another one.

There is no mix with cross-entropy, no temperature beside 1, and no other divergence: the reverse KL
to a bucket says nothing of what the student does inside it. The cache is read and checked by
trainers/core/teacher_cache.py. docs/teachers_cache.md has its form.

    python -m scripts.cache_teacher teacher=DIR model=DIR data=FILE out=CACHE
    torchrun --nproc_per_node=N train.py recipe=distill data.path=FILE teacher.cache=CACHE
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from recipes.errors import ConfigError
from rollouts.trajectory import Trajectory
from trainers.core.teacher_cache import TeacherCache, rows_of
from trainers.losses import Loss
from trainers.run import Run
from trainers.sft import SolutionReader, target_ids


class OfflineDistillation(SolutionReader):
    """Forward KL to the teacher of `teacher.cache`, averaged over the step's completion tokens."""

    @classmethod
    def check(cls, config) -> None:
        if config.teacher.cache is None:
            raise ConfigError(
                f"teacher.cache=null: recipe={config.recipe} reads a teacher's log-probs from a "
                "folder; write one with python -m scripts.cache_teacher teacher=DIR model=DIR "
                "data=FILE out=FOLDER"
            )

    @classmethod
    def prepare(cls, run: Run) -> None:
        """Open the cache, and compare it with the run's vocabulary and rows."""
        run.teacher = cache = TeacherCache(Path(run.config.teacher.cache).expanduser())
        cache.check_vocabulary(run)
        prompts, tokenizer = run.prompts, run.tokenizer
        rows = rows_of((p.index, p.token_ids, target_ids(p, tokenizer)) for p in prompts)
        cache.check_rows(rows, run.config.data.path)
        run.messages.append(f"teacher  {cache.described}")

    def annotate(self, trajectories: Sequence[Trajectory]) -> None:
        super().annotate(trajectories)
        self.run.teacher.annotate(trajectories)
        for trajectory in trajectories:
            if not self.run.teacher.scores_end(trajectory.completion_ids[-1]):
                trajectory.annotations["mask"][-1] = False

    def loss(self) -> Loss:
        return Loss(
            divergence={
                "divergence": "forward_kl",
                "top_k": self.run.teacher.top_k,
                "support": "cached",
                # There is no bucket where each token is in the support.
                "tail": "ignore" if self.run.teacher.whole else "bucket",
            },
            vocab=self.run.vocab,
        )

    def token_metrics(
        self, trajectory: Trajectory, output: Mapping[str, np.ndarray]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        cached = np.exp(trajectory.annotations["teacher_topk_logprobs"].astype(np.float64))
        tail = np.maximum(1 - cached.sum(axis=1), 0)
        return {"teacher/tail": (tail, trajectory.annotations["mask"])}
