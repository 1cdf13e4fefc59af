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


def read_eval_prompts(run: Run, answered: bool = True) -> None:
    """Fill in the evaluation prompts of a run with a tokenizer, and say what was dropped.

    Args:
        answered: leave out the rows without an answer, as nothing can be scored there.

    Raises:
        DataError: the data cannot be used, or no row is left.
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
    kept = [example for example in examples if example.answer is not None or not answered]
    if not kept:
        raise DataError(
            f"eval.path={path}: no row has an answer to score against; name its column with "
            "eval.answer_column"
        )
    run.eval_name = data_name(path)
    run.eval_prompts, run.eval_dropped = run.mode.prompts(kept, run.tokenizer, f"eval.path={path}")
    if run.eval_dropped:
        run.messages.append(
            f"eval  {run.eval_dropped} over-long prompts of {run.eval_name} were dropped"
        )
    unanswered = len(examples) - len(kept)
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
    sampling = sampling or run.mode.evaluation_sampling(run)
    trajectories = draw_completions(run, sampling, what)
    run.mode.score_all(run, run.eval_prompts, trajectories)
    scores = verifier_scores(trajectories, completions_per_prompt(run.config), run.config.eval.k)
    return scores | run.mode.metrics(run, trajectories, sampling), trajectories


def completions_per_prompt(config) -> int:
    """`eval.samples`, which is `eval.k` by default."""
    return config.eval.samples or config.eval.k


def draw_completions(run: Run, sampling: Sampling, what: str = "eval") -> list[Trajectory]:
    """This rank's completions of the evaluation prompts, those of a prompt adjacent.

    Args:
        run: with evaluation prompts and a rollout engine.
        sampling: how they are drawn.
        what: names the evaluation in the progress shown.
    """

    def seed(index: int, sample: int) -> int:
        return sample_seed(run.config.seed, 0, index, sample, "eval")

    prompts = shard_contiguous(list(run.eval_prompts))
    requests = make_requests(prompts, completions_per_prompt(run.config), seed)
    assert run.rollout is not None
    with Progress(what, len(requests), "completions", shown=rank() == 0) as progress:
        return run.rollout.generate(requests, sampling, on_finished=progress.advance)


def verifier_scores(trajectories: Sequence[Trajectory], count: int, k: int) -> dict[str, float]:
    """Avg@k, Pass@k and lengths over all ranks; `count` completions per prompt are adjacent.

    `timeouts` counts the completions whose verifier did not end in time, if there are any.
    """
    own = [
        (t.score > 0, int(t.sampled_mask.sum()), t.finish_reason == "length", t.timed_out)
        for t in trajectories
    ]
    correct, lengths, truncated, slow = zip(*(row for part in gather(own) for row in part))
    by_prompt = np.array(correct).reshape(-1, count).tolist()
    accuracy, length = avg_at_k(by_prompt), float(np.mean(lengths))
    scores = {
        f"avg@{k}": accuracy,
        f"pass@{k}": pass_at_k(by_prompt, k),
        "length_mean": length,
        "truncated_frac": float(np.mean(truncated)),
        "efficiency": 100 * accuracy / length,
    }
    return scores | ({"timeouts": sum(slow)} if any(slow) else {})
