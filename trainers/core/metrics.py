"""The numbers of a step, from per-token arrays of every micro-batch and rank."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rollouts.trajectory import Trajectory
from trainers.core.distributed import gather

POSITION_BINS = 32
# A sampled token agrees with the teacher if it is this close to the teacher's most likely one.
AGREEMENT_MARGIN = 1e-6  # nats


class TokenStats:
    """Accumulates sums over tokens and merges them over ranks.

    Every metric is a function of these sums. Arrays are [T] float32, log-probs in nats.

    Args:
        max_new_tokens: the longest completion, which the position bins divide.
    """

    def __init__(self, max_new_tokens: int):
        # Rounded up.
        self.bin_width = -(-max_new_tokens // POSITION_BINS)
        self.sums: dict[str, np.ndarray] = {}
        self.means: dict[str, np.ndarray] = {}
        self.lowest, self.highest = np.inf, -np.inf

    def update(
        self,
        trajectory: Trajectory,
        output: Mapping[str, np.ndarray],
        moved: bool = False,
        means: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> None:
        """Add one trajectory.

        Args:
            trajectory: annotated.
            output: the loss's per-token arrays.
            moved: the weights are no longer those that sampled the trajectory. Then
                `old_logprobs`, if there are any, tell how far trainer and sampler differ.
            means: metric name -> (values [T], which tokens count [T] bool), of the method.
        """
        annotations = trajectory.annotations
        mask = annotations["mask"]
        if "entropy" in output:
            self._add("entropy", mask.sum(), _total(output["entropy"], mask))
        for name, (values, counted) in (means or {}).items():
            self._add_mean(name, values, counted)
        trainer = annotations.get("old_logprobs", None if moved else output.get("logprobs"))
        if trainer is not None and trajectory.logprobs is not None:
            self._add_mismatch(trajectory, trainer)
        if "teacher_logprobs" in annotations and "logprobs" in output:
            self._add_teacher(trajectory, output)
        if "rewards" in output:
            self._add_rewards(output["rewards"].astype(np.float64), mask)

    def _add_mean(self, name: str, values: np.ndarray, counted: np.ndarray) -> None:
        sums = np.array([counted.sum(), _total(values, counted)], dtype=np.float64)
        self.means[name] = self.means.get(name, 0) + sums

    def _add_mismatch(self, trajectory: Trajectory, trainer: np.ndarray) -> None:
        """Trainer against sampler, on the tokens that both scored."""
        annotations = trajectory.annotations
        # The kernels leave masked tokens out.
        counted = annotations["mask"]
        if "targets" in annotations:
            # A relabelled stop is not what was sampled.
            sampled = np.asarray(trajectory.completion_ids)
            counted = counted & (annotations["targets"] == sampled)
        gap = trainer.astype(np.float64) - trajectory.logprobs
        gap = gap[counted]
        ratio = np.exp(gap)
        # The k3 estimate of KL(sampler || trainer).
        kl = np.expm1(gap) - gap
        self._add(
            "mismatch",
            counted.sum(),
            np.abs(gap).sum(),
            kl.sum(),
            ratio.sum(),
            (ratio * ratio).sum(),
        )

    def _add_teacher(self, trajectory: Trajectory, output: Mapping[str, np.ndarray]) -> None:
        annotations = trajectory.annotations
        counted = compared_tokens(trajectory)
        teacher = annotations["teacher_logprobs"].astype(np.float64)
        # The log-ratio of a sampled token estimates the reverse KL, where it is not computed.
        if "divergence" in output:
            kl = output["divergence"]
        else:
            kl = compared_logprobs(trajectory, output) - teacher
        self._add("teacher", counted.sum(), kl[counted].sum())
        # The most likely token of a mixture of teachers is not known.
        if "teacher_max_logprobs" in annotations:
            likely = annotations["teacher_max_logprobs"] - AGREEMENT_MARGIN
            agrees = teacher >= likely
            self._add("agreement", counted.sum(), agrees[counted].sum())

    def _add_rewards(self, rewards: np.ndarray, mask: np.ndarray) -> None:
        unmasked = rewards[mask]
        squares = np.square(unmasked)
        self._add("reward", unmasked.size, unmasked.sum(), squares.sum())
        if unmasked.size:
            self.lowest = min(self.lowest, unmasked.min())
            self.highest = max(self.highest, unmasked.max())
        positions = np.arange(len(mask)) // self.bin_width
        bins = np.minimum(positions, POSITION_BINS - 1)[mask]
        totals = np.bincount(bins, unmasked, POSITION_BINS)
        counts = np.bincount(bins, minlength=POSITION_BINS)
        self._add("position", totals, counts)

    def _add(self, name: str, *values: float | np.ndarray) -> None:
        """Add to the sums of this name, laid end to end: the count first, then the totals."""
        arrays = [np.atleast_1d(np.asarray(value, dtype=np.float64)) for value in values]
        self.sums[name] = self.sums.get(name, 0) + np.concatenate(arrays)

    def metrics(self) -> dict[str, float | list]:
        """The metrics over all ranks. A collective."""
        parts = gather((self.sums, self.means, self.lowest, self.highest))
        all_sums, all_means, lowest, highest = zip(*parts)
        sums, means = _merged(all_sums), _merged(all_means)
        row: dict[str, float | list] = {}
        if _counted(sums, "reward"):
            row |= self._reward_metrics(sums, min(lowest), max(highest))
        if _counted(sums, "entropy"):
            count, total = sums["entropy"]
            row["rollout/entropy"] = total / count
        for name, (count, total) in means.items():
            if count:
                row[name] = total / count
        if _counted(sums, "mismatch"):
            row |= _mismatch_metrics(*sums["mismatch"])
        if _counted(sums, "teacher"):
            count, kl = sums["teacher"]
            row["teacher/kl"] = kl / count
        if _counted(sums, "agreement"):
            count, agreements = sums["agreement"]
            row["teacher/agreement"] = agreements / count
        return {name: _plain(value) for name, value in row.items()}

    def _reward_metrics(
        self, sums: dict[str, np.ndarray], lowest: float, highest: float
    ) -> dict[str, float | list]:
        count, total, squares = sums["reward"]
        mean = total / count
        totals, counts = np.split(sums["position"], 2)
        by_position = [
            in_bin / tokens if tokens else None
            for in_bin, tokens in zip(totals.tolist(), counts.tolist())
        ]
        return {
            "reward/mean": mean,
            "reward/std": max(squares / count - mean**2, 0.0) ** 0.5,
            "reward/min": lowest,
            "reward/max": highest,
            "reward/by_position": by_position,
            "reward/by_position_bins": [i * self.bin_width for i in range(POSITION_BINS)],
        }


def compared_tokens(trajectory: Trajectory) -> np.ndarray:
    """[T] bool: the tokens on which student and teacher are compared.

    They are the unmasked ones, with those that were not selected to learn from.
    """
    annotations = trajectory.annotations
    if trajectory.padding:
        return annotations["mask"]
    return annotations.get("candidates", annotations["mask"])


def compared_logprobs(trajectory: Trajectory, output: Mapping[str, np.ndarray]) -> np.ndarray:
    """[T] nats, the student's log-probs of these tokens.

    Args:
        trajectory: annotated.
        output: the loss's per-token arrays, which have nothing for tokens that do not learn.
    """
    selected = "candidates" in trajectory.annotations
    return trajectory.annotations["student_logprobs"] if selected else output["logprobs"]


def _mismatch_metrics(
    count: float, gap: float, kl: float, ratio: float, squares: float
) -> dict[str, float | list]:
    """From sums over tokens: |gap|, the k3 estimate, the ratio and its square."""
    return {
        "mismatch/logp_abs_mean": gap / count,
        "mismatch/kl": kl / count,
        "mismatch/ess": ratio**2 / (count * squares),
    }


def _total(values: np.ndarray, counted: np.ndarray) -> float:
    wide = values.astype(np.float64)
    return wide[counted].sum()


def _merged(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The sum over ranks of each name's array."""
    sums: dict[str, np.ndarray] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def _counted(sums: dict[str, np.ndarray], name: str) -> bool:
    """Whether any token entered the sums of this name, whose first entry is the count."""
    return name in sums and bool(sums[name][0])


def _plain(value):
    return float(value) if isinstance(value, np.floating | int) else value


def rollout_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """The metrics of a step's whole completions.

    Returns:
        `rollout/length_mean`: in tokens;
        `rollout/truncated_frac`: the share that was cut at the limit;
        `reward/accuracy`: the verifier's mean score, where there are scores;
        `rollout/efficiency`: that in % per token;
        `reward/timeouts`: completions whose verifier did not end in time, if there are any;
        `reward/{mean,std,min,max}`: of the rewards of whole completions, where there are any.
    """
    length = float(np.mean([t.sampled_mask.sum() for t in trajectories]))
    truncated = [t.finish_reason == "length" for t in trajectories]
    row = {"rollout/length_mean": length, "rollout/truncated_frac": float(np.mean(truncated))}
    scores = [t.score for t in trajectories if t.score is not None]
    if scores:
        accuracy = float(np.mean(scores))
        row["reward/accuracy"] = accuracy
        row["rollout/efficiency"] = 100 * accuracy / length
    for name in trajectories[0].functions:
        row[f"reward/{name}/mean"] = float(np.mean([t.functions[name] for t in trajectories]))
        if failed := sum(name in t.failures for t in trajectories):
            row[f"reward/{name}/failed"] = failed
    if timeouts := sum(t.timed_out for t in trajectories):
        row["reward/timeouts"] = timeouts
    rewards = [t.reward for t in trajectories if t.reward is not None]
    if rewards:
        for name in ("mean", "std", "min", "max"):
            row[f"reward/{name}"] = float(getattr(np, name)(rewards))
    return row


def peak_memory_gib(device: torch.device) -> float:
    """The largest memory use so far, in GiB: of this rank's GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
