"""What people see of a run: lines and a progress bar, metrics.jsonl, completions.jsonl, W&B."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from recipes.compose import to_yaml
from recipes.errors import CheckpointError, ConfigError, one_line
from rollouts.trajectory import Trajectory
from trainers.core.checkpoint import complete, remove_leftovers, set_aside
from trainers.core.distributed import gather, rank
from trainers.core.lock import cannot_write
from trainers.core.progress import clock
from trainers.core.rundir import config_at, earlier_configs
from trainers.core.wandb_run import WandbRun, mode
from trainers.core.watchdog import heard

# Of a step's printed line: metric, label, format.
FIGURES = (
    ("reward/mean", "reward", "+.4f"),
    ("reward/accuracy", "acc", ".3f"),
    ("rollout/kept_frac", "kept", ".3f"),
    ("teacher/kl", "kl", ".3f"),
    ("rollout/length_mean", "len", ".1f"),
)


class Tracker:
    """Writes a run's records. Only rank 0's instance does anything.

    Args:
        config: the run's.
        run_dir: the run directory.
        start: the step that the run continues after. Later rows of an interrupted attempt are
            dropped.
        summary: the reading mode's part of an evaluation's printed line, made from its scores.

    Raises:
        ConfigError: the run directory cannot be written to.
        CheckpointError: later, a record cannot be written; the message names the last checkpoint.
    """

    def __init__(self, config, run_dir: Path, start: int, summary: Callable[[dict[str, Any]], str]):
        self.active = rank() == 0
        if not self.active:
            return
        self.config, self.summary, self.run_dir = config, summary, run_dir
        try:
            notes = self._open(start)
        except OSError as error:
            raise ConfigError(cannot_write(run_dir, error)) from error
        self.wandb = None if mode(config) == "disabled" else WandbRun(config, run_dir, start)
        # Seconds of the last steps.
        self.recent: deque[float] = deque(maxlen=20)
        # disable=None: no bar where stderr is no terminal. Every line has the time left anyway.
        self.bar = tqdm(
            total=config.train.steps,
            initial=start,
            desc=config.recipe,
            unit="step",
            dynamic_ncols=True,
            disable=None,
        )
        for note in (*notes, *(self.wandb.notes if self.wandb else ())):
            self.say(note)

    def _open(self, start: int) -> list[str]:
        """Make the run directory ready for the steps after `start`; returns remarks."""
        run_dir = self.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run_dir)
        notes = set_aside(run_dir, start)
        write_config(run_dir, to_yaml(self.config), start)
        # A run from its start evaluates before step 1, under step 0; no earlier row may stay.
        last = start or -1
        self.metrics_file = _continued(run_dir / "metrics.jsonl", last)
        self.completions_file = _continued(run_dir / "completions.jsonl", last)
        return notes

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            tqdm.write(text)
            heard()
            # A log or a pipe, too, shows each line at once.
            sys.stdout.flush()

    def step(self, row: dict[str, Any]) -> None:
        """Record one optimizer step, and move the bar.

        Args:
            row: the step's metrics by name, with `step`.
        """
        if not self.active:
            return
        self._record(row)
        self.recent.append(row["time/step"])
        self.bar.update()
        step, steps = row["step"], self.config.train.steps
        if step % self.config.log.every == 0 or step == steps:
            left = (steps - step) * sum(self.recent) / len(self.recent)
            self.say(_line(row, steps, left))

    def evaluation(self, step: int, scores: dict[str, Any], name: str, seconds: float) -> None:
        """Record an evaluation: a row with `eval/NAME/…`, and a printed line.

        Args:
            step: the last one before it.
            scores: of `trainers.evaluation.evaluate`.
            name: the data's.
            seconds: the time that it took.
        """
        if not self.active:
            return
        row = {f"eval/{name}/{key}": value for key, value in scores.items()}
        self._record({"step": step, **row, "time/eval": seconds})
        k = self.config.eval.k
        self.say(
            f"eval  step {step}  {name}: avg@{k} {scores[f'avg@{k}']:.3f}  "
            f"pass@{k} {scores[f'pass@{k}']:.3f}  length {scores['length_mean']:.1f}  "
            f"{self.summary(scores)}truncated {scores['truncated_frac']:.1%}  ({seconds:.0f} s)"
        )

    def completions(self, step: int, trajectories: Sequence[Trajectory], tokenizer) -> None:
        """Record a step's sample of trajectories, with each token's reward.

        Args:
            step: the step's number.
            trajectories: the sample, in the order of the file.
            tokenizer: decodes their tokens one by one.
        """
        if not self.active:
            return
        for trajectory in trajectories:
            row = _completion_row(step, trajectory, tokenizer)
            row = {name: _finite(value) for name, value in row.items()}
            self._write(self.completions_file, json.dumps(row, ensure_ascii=False))

    def finish(self) -> None:
        """Close everything."""
        if not self.active:
            return
        self.bar.close()
        self.metrics_file.close()
        self.completions_file.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _record(self, row: dict) -> None:
        values = {name: _finite(value) for name, value in row.items()}
        self._write(self.metrics_file, json.dumps(values))
        if self.wandb is not None:
            self.wandb.log(values)

    def _write(self, file: TextIO, line: str) -> None:
        """Raises CheckpointError: the line cannot be written."""
        try:
            file.write(line + "\n")
        except OSError as error:
            # What is left in its buffer cannot be written either.
            with contextlib.suppress(OSError):
                file.close()
            points = complete(self.run_dir)
            last = f"the last checkpoint is {points[-1]}" if points else "there is no checkpoint"
            raise CheckpointError(
                f"{file.name} could not be written ({one_line(error)}); {last}; make room, and "
                "continue with resume=auto"
            ) from error

    def lacks_evaluation(self, due: bool) -> bool:
        """Whether the records end with a step whose evaluation is missing. A collective.

        Args:
            due: whether the step that a run continues after is evaluated.
        """
        missing = False
        if self.active and due:
            rows = _rows(self.run_dir / "metrics.jsonl")
            missing = bool(rows) and not any("eval/" in name for name in rows[-1])
        return gather(missing)[0]


def write_config(run_dir: Path, text: str, start: int) -> None:
    """Write config.yaml; at a resume, what it was up to that step stays as config.START.yaml.

    Args:
        run_dir: the run directory.
        text: the new one.
        start: the step that the run continues after.
    """
    file = run_dir / "config.yaml"
    written = file.with_name("config.yaml.tmp")
    written.write_text(text, encoding="utf-8")
    before = config_at(run_dir, start)
    if start and before.exists():
        before.rename(run_dir / f"config.{start}.yaml")
    # Of steps whose records are dropped.
    for end, path in earlier_configs(run_dir).items():
        if end > start:
            path.unlink()
    written.replace(file)


def _continued(path: Path, step: int) -> TextIO:
    """A .jsonl to append to, without the records that are later than `step`."""
    keep_through(path, step)
    return path.open("a", buffering=1, encoding="utf-8")


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl that `keep_through` has made whole."""
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def _completion_row(step: int, trajectory: Trajectory, tokenizer) -> dict[str, Any]:
    """A row of completions.jsonl."""
    rewards, reward = trajectory.annotations.get("rewards"), trajectory.reward
    if reward is None and rewards is not None:
        reward = float(rewards.mean())
    row = {
        "step": step,
        "prompt": trajectory.prompt,
        "completion": trajectory.completion,
        "answer": trajectory.answer,
        "reward": reward,
        "correct": None if trajectory.score is None else trajectory.score > 0,
        "finish_reason": trajectory.finish_reason,
        "length": len(trajectory.completion_ids),
        "tokens": [tokenizer.decode([token]) for token in trajectory.completion_ids],
    }
    if rewards is not None:
        row["token_rewards"] = [round(float(r), 5) for r in rewards]
    return row


def _finite(value):
    """JSON has no NaN or infinity: null stands for both."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: dict[str, Any], steps: int, left: float) -> str:
    """A step's printed line; `left` is in seconds."""
    parts = [
        f"step {row['step']:>{len(str(steps))}}/{steps}",
        f"loss {row['train/loss']:+.4f}",
        f"grad {row['train/grad_norm']:.3g}",
    ]
    for name, label, form in FIGURES:
        if name in row:
            parts.append(f"{label} {row[name]:{form}}")
    parts += [f"{row['perf/tokens_per_second']:.0f} tok/s", f"{clock(left)} left"]
    return "  ".join(parts)


def keep_through(path: Path, step: int) -> None:
    """Drop the records of a .jsonl that are later than `step`, and a last line that was cut off."""
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    # Lines end in a line feed alone. Texts may hold U+2028 and others, which str.splitlines takes
    # for ends.
    with (
        path.open(encoding="utf-8", newline="\n") as lines,
        temporary.open("w", encoding="utf-8") as output,
    ):
        for line in lines:
            with contextlib.suppress(ValueError, KeyError):
                if json.loads(line)["step"] <= step:
                    output.write(line.removesuffix("\n") + "\n")
    temporary.replace(path)
