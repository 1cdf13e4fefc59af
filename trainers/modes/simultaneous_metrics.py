"""What an evaluation of a simultaneous model reports: quality and lag, with a decision head that
was calibrated."""

from __future__ import annotations

from dataclasses import replace
from typing import Sequence

import numpy as np

from recipes.components import DECISION_HEADS
from rewards.metrics.lag import lags
from rewards.metrics.text import text_scores
from rollouts.data.examples import Prompt
from rollouts.data.load import configured_examples
from rollouts.simultaneous.decision import Head, Recorder, check_heads
from rollouts.simultaneous.prompts import unit_prompts
from rollouts.trajectory import Sampling, Trajectory
from trainers.core.distributed import gather, share
from trainers.modes.rollout import make_requests


def make_head(config, rollout, tokenizer, sampling: Sampling) -> Head:
    """`proactive.head` with its setting, which is measured on the calibration set where
    `proactive.setting` is null.

    A collective in that case. Raises ConfigError or DataError: a setting out of range or missing,
    or nothing to calibrate on."""
    options = config.proactive
    check_heads(options)
    kind = DECISION_HEADS.resolve(options.head)
    if options.setting is not None:
        return kind(options.setting)
    if not kind.calibrated:
        return kind(0.0)
    return kind(calibrate(kind, config, rollout, tokenizer, sampling).quantile(options.quantile))


def calibrate(kind: type[Head], config, rollout, tokenizer, sampling: Sampling) -> Recorder:
    """The scores that the head gives on the calibration set with the whole input read. A
    collective."""
    options = config.proactive
    path = options.calibration_path or config.data.path
    examples = configured_examples(
        config.data,
        config.seed,
        path,
        limit=options.calibration_size,
        size=options.calibration_size,
    )
    prompts, _ = unit_prompts(examples, tokenizer, config, f"proactive.calibration_path={path}")
    recorder = Recorder(kind(kind.low))
    requests = make_requests(share(prompts), 1, lambda index, sample: index)
    rollout.generate(requests, replace(sampling, head=recorder, temperature=0.0))
    recorder.scores = [score for part in gather(recorder.scores) for score in part]
    return recorder


def delays(trajectory: Trajectory, starts: np.ndarray) -> np.ndarray:
    """Source units that were read when each target word was complete, i.e. at its last token; the
    end is no word."""
    own = trajectory.sampled_mask
    ids, reads = np.asarray(trajectory.completion_ids)[own], trajectory.reads[own]
    if trajectory.finish_reason == "stop":
        ids, reads = ids[:-1], reads[:-1]
    if not len(ids):
        return reads
    begins = np.flatnonzero(np.append(False, starts[ids[1:]]))
    return reads[np.append(begins, len(ids)) - 1]


def simultaneous_metrics(
    prompts: Sequence[Prompt], trajectories: Sequence[Trajectory], starts: np.ndarray
) -> dict[str, float]:
    """Means over the completions of all ranks, BLEU and chrF of the corpus. A collective.

    Args:
        starts: [V] bool, the tokens that begin a word.

    Returns:
        `bleu`, `chrf` (0 to 100), `f1`, `exact` (0 to 1; rewards/metrics/text.py); `rco`, `ail`, `al`,
        `laal` in source units (rewards/metrics/lag.py), over the completions that are not empty; NaN if all
        are.
    """
    by_index = {prompt.index: prompt for prompt in prompts}
    rows = []
    for trajectory in trajectories:
        prompt = by_index[trajectory.prompt_index]
        references = prompt.example.references or (
            prompt.example.solution or prompt.example.answer,
        )
        spent = delays(trajectory, starts)
        lag = (
            lags(spent.tolist(), len(prompt.segments) - 1, len(references[0].split()))
            if len(spent)
            else {}
        )
        rows.append((trajectory.completion, references, lag))
    rows = [row for part in gather(rows) for row in part]
    measured = [lag for _, _, lag in rows if lag]
    return text_scores([text for text, _, _ in rows], [references for _, references, _ in rows]) | {
        name: float(np.mean([lag[name] for lag in measured])) if measured else float("nan")
        for name in ("rco", "ail", "al", "laal")
    }
