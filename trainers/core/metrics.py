"""The numbers of a step, from per-token arrays of every micro-batch and rank."""

from __future__ import annotations

import resource
from typing import Sequence

import numpy as np
import torch

from rollouts.trajectory import Trajectory
from trainers.core.distributed import gather

POSITION_BINS = 32


class TokenStats:
    """Accumulates sums over tokens and merges them over ranks; every metric below is a function of
    those sums.

    Arrays are [T] float32 in nats: `logprobs` the trainer's, `sampler` the rollout engine's,
    `teacher` the teacher's, all of the sampled tokens; `rewards`; `entropy` of the trainer's
    distribution; `MEANS`."""

    # per-token outputs whose mean is a metric
    MEANS = {"kl": "reference/kl", "clipped": "policy/clip_frac"}

    # of trainers/proactivellm.py
    VIEWS = {name: name for name in ("nll/batch", "nll/stream", "teacher/kl")}

    def __init__(self, max_new_tokens: int):
        self.width = -(-max_new_tokens // POSITION_BINS)
        self.sums: dict[str, np.ndarray] = {}
        self.low, self.high = np.inf, -np.inf

    def _add(self, name: str, *values: float | np.ndarray) -> None:
        total = np.concatenate([np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in values])
        self.sums[name] = self.sums.get(name, 0) + total

    def update(
        self, trajectory: Trajectory, output: dict[str, np.ndarray], moved: bool = False
    ) -> None:
        """Add one trajectory with the loss's per-token `output`. `moved`: the weights are no longer
        those that sampled it, so that what sampler and trainer differ by is known only from
        `old_logprobs`, if there are any."""
        notes, mask = trajectory.annotations, trajectory.annotations["mask"]
        self._add("tokens", mask.sum())
        if "entropy" in output:
            self._add("entropy", output["entropy"].astype(np.float64)[mask].sum(), mask.sum())
        for name in self.MEANS.keys() & output.keys():
            self._add(name, mask.sum(), output[name].astype(np.float64)[mask].sum())
        ours = output.get("logprobs")
        # targets that appear twice: with all of the source in view, and with a part
        if "whole_view" in notes:
            for name, chosen in (
                ("nll/batch", notes["whole_view"]),
                ("nll/stream", ~notes["whole_view"]),
            ):
                self._add(
                    name, (mask & chosen).sum(), -ours.astype(np.float64)[mask & chosen].sum()
                )
        if "teacher_distance" in notes:
            taught = mask & (notes["teacher_distance"] > 0)
            self._add(
                "teacher/kl", taught.sum(), output["divergence"].astype(np.float64)[taught].sum()
            )
        before = notes.get("old_logprobs", None if moved else ours)
        if before is not None and trajectory.logprobs is not None:
            same = mask  # the kernels leave masked tokens out
            if "targets" in notes:  # a relabelled stop is not what was sampled
                same = mask & (notes["targets"] == np.asarray(trajectory.completion_ids))
            gap = (before.astype(np.float64) - trajectory.logprobs)[same]
            ratio = np.exp(gap)
            self._add(
                "mismatch",
                same.sum(),
                np.abs(gap).sum(),
                (np.expm1(gap) - gap).sum(),
                ratio.sum(),
                (ratio * ratio).sum(),
            )
        if "teacher_logprobs" in notes and ours is not None:
            teacher = notes["teacher_logprobs"].astype(np.float64)
            gap = output["divergence"] if "divergence" in output else ours - teacher
            top = teacher >= notes["teacher_max_logprobs"] - 1e-6
            self._add("teacher", mask.sum(), gap[mask].sum(), top[mask].sum())
        if "rewards" in output:
            rewards = output["rewards"].astype(np.float64)
            kept = rewards[mask]
            self._add("reward", kept.size, kept.sum(), np.square(kept).sum())
            if kept.size:
                self.low, self.high = min(self.low, kept.min()), max(self.high, kept.max())
            bins = np.minimum(np.arange(len(mask)) // self.width, POSITION_BINS - 1)[mask]
            self._add(
                "position",
                np.bincount(bins, kept, POSITION_BINS),
                np.bincount(bins, minlength=POSITION_BINS),
            )

    def metrics(self) -> dict[str, float | list]:
        """The metrics over all ranks. A collective."""
        parts = gather((self.sums, self.low, self.high))
        sums: dict[str, np.ndarray] = {}
        for part, _, _ in parts:
            for name, value in part.items():
                sums[name] = sums.get(name, 0) + value
        row: dict[str, float | list] = {}
        if "reward" in sums and sums["reward"][0]:
            count, total, squares = sums["reward"]
            mean = total / count
            row |= {
                "reward/mean": mean,
                "reward/std": max(squares / count - mean**2, 0.0) ** 0.5,
                "reward/min": min(p[1] for p in parts),
                "reward/max": max(p[2] for p in parts),
            }
            totals, counts = np.split(sums["position"], 2)
            row["reward/by_position"] = [
                t / c if c else None for t, c in zip(totals.tolist(), counts.tolist())
            ]
            row["reward/by_position_bins"] = [i * self.width for i in range(POSITION_BINS)]
        if "entropy" in sums and sums["entropy"][1]:
            row["rollout/entropy"] = sums["entropy"][0] / sums["entropy"][1]
        row |= {
            metric: sums[name][1] / sums[name][0]
            for name, metric in (self.MEANS | self.VIEWS).items()
            if name in sums and sums[name][0]
        }
        if "mismatch" in sums and sums["mismatch"][0]:
            count, gap, kl, ratio, squares = sums["mismatch"]
            row |= {
                "mismatch/logp_abs_mean": gap / count,
                "mismatch/kl": kl / count,
                "mismatch/ess": ratio**2 / (count * squares),
            }
        if "teacher" in sums and sums["teacher"][0]:
            count, gap, top = sums["teacher"]
            row |= {"teacher/kl": gap / count, "teacher/agreement": top / count}
        return {
            name: float(value) if isinstance(value, (np.floating, int)) else value
            for name, value in row.items()
        }


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Lengths (tokens), the share cut at the limit, the verifier's mean score and that in % per
    token, and the rewards of whole completions where there are any, of a step's trajectories."""
    length = float(np.mean([t.sampled_mask.sum() for t in trajectories]))
    row = {
        "rollout/length_mean": length,
        "rollout/truncated_frac": float(
            np.mean([t.finish_reason == "length" for t in trajectories])
        ),
    }
    scores = [t.score for t in trajectories if t.score is not None]
    if scores:
        row |= {
            "reward/accuracy": float(np.mean(scores)),
            "rollout/efficiency": 100 * float(np.mean(scores)) / length,
        }
    rewards = [t.reward for t in trajectories if t.reward is not None]
    if rewards:
        row |= {
            f"reward/{name}": float(getattr(np, name)(rewards))
            for name in ("mean", "std", "min", "max")
        }
    return row


def peak_memory_gib(device: torch.device) -> float:
    """The largest memory use so far, in GiB: of this rank's GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
