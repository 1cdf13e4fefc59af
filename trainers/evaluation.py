"""Evaluation: n completions per prompt, scored by a verifier, as Avg@k, Pass@k and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recipes.errors import DataError
from rewards.metrics.pass_at_k import avg_at_k, pass_at_k
from rollouts.data.load import configured_examples
from rollouts.trajectory import Sampling, Trajectory, sample_seed
from trainers.core.distributed import gather, rank, shard_contiguous
from trainers.core.progress import Progress
from trainers.core.watchdog import during
from trainers.modes.plain import make_requests
from trainers.run import Run

GENERATED = ("stories", "translation")  # data sets with a held-out part


def data_name(path: str) -> str:
    """The name that a data set has in metric names: a file's stem, a hub name's last part."""
    return Path(path.rstrip("/")).stem


def eval_path(config) -> str | None:
    """What is evaluated on: `eval.path`, else the held-out part of generated training data."""
    generated = config.data.path if config.data.path in GENERATED else None
    return config.eval.path or generated


def read_eval_prompts(run: Run) -> None:
    """Fill in the evaluation prompts of a run with a tokenizer, and say what was dropped.

    Raises:
        DataError: the data cannot be used, or no row of it has an answer.
    """
    config, data, evaluation = run.config, run.config.data, run.config.eval
    path = eval_path(config)
    examples = configured_examples(
        config.data,
        config.seed,
        path,
        split=evaluation.split,
        limit=evaluation.size,
        size=evaluation.size,
        verbose=False,
        varied=False,
        prompt_column=evaluation.prompt_column or data.prompt_column,
        answer_column=evaluation.answer_column or data.answer_column,
        target_column=evaluation.target_column or data.target_column,
    )
    answered = [example for example in examples if example.answer is not None]
    if not answered:
        raise DataError(
            f"eval.path={path}: no row has an answer to score against; name its column with "
            "eval.answer_column"
        )
    run.eval_name = data_name(path)
    run.eval_prompts, run.eval_dropped = run.mode.prompts(
        answered, run.tokenizer, f"eval.path={path}"
    )
    if run.eval_dropped:
        run.messages.append(
            f"eval  {run.eval_dropped} over-long prompts of {run.eval_name} were dropped"
        )
    unanswered = len(examples) - len(answered)
    if unanswered:
        run.messages.append(
            f"eval  {unanswered} of {len(examples)} rows of {run.eval_name} have no answer and "
            "were dropped"
        )


@during("evaluate")
def evaluate(
    run: Run, sampling: Sampling | None = None, what: str = "eval"
) -> tuple[dict[str, float], list[Trajectory]]:
    """Sample and score. A collective: each rank takes its part of the prompts.

    The seeds depend on the prompt and sample only, so every evaluation of a run uses the same
    noise.

    Args:
        run: with evaluation prompts and a rollout engine.
        sampling: None: that of the config.
        what: names the evaluation in the progress shown.

    Returns:
        `avg@k`, `pass@k`, `length_mean` (tokens), `truncated_frac`, `efficiency` (accuracy in % per
        token) and the reading mode's metrics; and this rank's trajectories.
    """
    k, count = run.config.eval.k, run.config.eval.samples or run.config.eval.k

    def seed(index: int, sample: int) -> int:
        return sample_seed(run.config.seed, 0, index, sample, "eval")

    requests = make_requests(shard_contiguous(list(run.eval_prompts)), count, seed)
    sampling = sampling or run.mode.evaluation_sampling(run)
    with Progress(what, len(requests), "completions", shown=rank() == 0) as progress:
        trajectories = run.rollout.generate(requests, sampling, on_finished=progress.advance)
    run.mode.score_all(run, run.eval_prompts, trajectories)
    scores = verifier_scores(trajectories, count, k)
    return scores | run.mode.metrics(run, trajectories, sampling), trajectories


def verifier_scores(trajectories: Sequence[Trajectory], count: int, k: int) -> dict[str, float]:
    """Avg@k, Pass@k and lengths over all ranks; `count` completions per prompt are adjacent."""
    own = [
        (t.score > 0, int(t.sampled_mask.sum()), t.finish_reason == "length") for t in trajectories
    ]
    correct, lengths, truncated = zip(*(row for part in gather(own) for row in part))
    by_prompt = np.array(correct).reshape(-1, count).tolist()
    accuracy, length = avg_at_k(by_prompt), float(np.mean(lengths))
    return {
        f"avg@{k}": accuracy,
        f"pass@{k}": pass_at_k(by_prompt, k),
        "length_mean": length,
        "truncated_frac": float(np.mean(truncated)),
        "efficiency": 100 * accuracy / length,
    }
