"""Latency-quality curves: the decision heads of a simultaneous model, swept over their settings."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.components import DECISION_HEADS
from recipes.languages import DEFAULT_BLEU_TOKENIZER
from rollouts.simultaneous.decision import DecisionHead, SimultaneousSampling
from trainers.core.distributed import rank

# Of a calibrated head's scores on the calibration set.
QUANTILES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99, 1.0)
FIGURES = ("bleu", "chrf", "f1", "exact", "al", "laal", "rco", "ail")

Scores = dict[str, float]


def write_curves(
    run, heads: Sequence[str], out: Path, model: Path | str, evaluate: Callable[..., Any]
) -> dict[str, Any]:
    """Sweep decision heads on the evaluation data, and write the JSON from which a report draws.

    A collective. Curves of the same model and data that the file has already stay in it.

    Args:
        run: a `Run` with evaluation prompts and a rollout engine.
        heads: names of decision heads.
        out: the file.
        model: where the weights in the engine came from.
        evaluate: (run, sampling) -> (scores, trajectories), `trainers.evaluation.evaluate`.

    Returns:
        what the file holds.

    Raises:
        OnstreamError: a head or the calibration data cannot be used.
    """
    config = run.config
    limit = config.eval.max_new_tokens or config.rollout.max_new_tokens
    sampling = run.mode.sampling(
        run.tokenizer,
        run.stop_ids,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        max_new_tokens=limit,
        vocab=run.vocab,
        missing=run.missing,
    )
    about = {
        "model": resolved(model),
        "data": run.eval_name,
        "prompts": len(run.eval_prompts),
        "measured": {
            "path": resolved(config.eval.path or config.data.path),
            "split": config.eval.split,
            "unit": config.streaming.unit,
            "temperature": config.eval.temperature,
            "max_new_tokens": limit,
        },
    }
    if run.mode.bleu_tokenizer != DEFAULT_BLEU_TOKENIZER:
        about["measured"]["bleu_tokenizer"] = run.mode.bleu_tokenizer
    policies: dict[str, list[Scores]] = {}
    for name in heads:
        kind = DECISION_HEADS.resolve(name)
        label = name + (bounds_label(config.proactive) if kind.adaptive else "")
        policies[label] = []
        for point in settings(kind, run, sampling):
            head = kind(point["setting"])
            scores, _ = evaluate(run, replace(sampling, head=head))
            policies[label].append(point | {figure: _finite(scores[figure]) for figure in FIGURES})
            _say(label, point["setting"], scores)
    # A file that holds nothing of this model and data is written anew.
    policies = curves_in(out, about) | policies
    curves = about | {"quality": "bleu", "lag": "al", "policies": policies}
    if rank() == 0:
        out.write_text(json.dumps(curves, indent=1))
    return curves


def settings(
    kind: type[DecisionHead], run, sampling: SimultaneousSampling
) -> Iterator[dict[str, float]]:
    """The settings of a head's curve; a calibrated head's are quantiles of its scores."""
    if not kind.calibrated:
        yield from ({"setting": setting} for setting in kind.sweep)
        return
    recorder = run.mode.calibrate(kind, run, sampling)
    for share in QUANTILES:
        yield {"setting": recorder.quantile(share), "quantile": share}


def curves_in(file: Path, about: dict[str, Any]) -> dict[str, list[Scores]]:
    """The curves that a file has of the same model and data."""
    try:
        curves = json.loads(file.read_text())
        same = all(curves.get(key) == value for key, value in about.items())
        return curves["policies"] if same else {}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def resolved(name: Path | str) -> str:
    """The whole path of what is here; the Hub's names stay."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else str(name)


def bounds_label(options) -> str:
    """What makes a head another one than its name says.

    Args:
        options: the config's section `proactive`.
    """
    low, high = options.min_lag, options.max_lag
    label = ""
    if low or high is not None:
        label += f", lag {low} to {'any' if high is None else high}"
    if options.max_reads:
        label += f", at most {options.max_reads} reads"
    return label if options.whole_words else f"{label}, at every token"


def _finite(value: float) -> float | None:
    """JSON has no NaN: null stands for it."""
    return value if math.isfinite(value) else None


def _say(label: str, setting: float, scores: Scores) -> None:
    if rank() == 0:
        figures = "  ".join(f"{figure} {scores[figure]:.3g}" for figure in FIGURES)
        print(f"curve  {label} {setting:.3g}: {figures}", file=sys.stderr)
