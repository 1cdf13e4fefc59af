"""Latency-quality curves of a simultaneous model: its decision heads swept over their settings.

    python -m scripts.curves model=DIR data=NAME_OR_FILE [heads=batch,wait_k,entropy] [out=FILE] [KEY=VALUE …]

Keys are those of `scripts.evaluate`. wait_k, ratio and edatt are swept over fixed values, entropy
and attention over quantiles of their scores on the calibration set (`proactive.calibration_path`;
else `data`, of split `data.split`). The figures go to `out` (default: curves.json in the run that
the model is a checkpoint of, else here), from which a run's report draws them, and to stdout as
JSON; curves of the same model and data that are there stay. Training ends with the same, for the
heads in `proactive.curve`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from scripts.cli import print_error, quiet_libraries

QUANTILES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98, 0.99, 1.0)
FIGURES = ("bleu", "chrf", "f1", "exact", "al", "laal", "rco", "ail")


def main(arguments: list[str]) -> int:
    """Returns the exit status; a mistake of the user's ends in one line on stderr."""
    from recipes.compose import compose
    from recipes.errors import ConfigError, OnstreamError
    from scripts.evaluate import SHORT, key_values

    try:
        given = key_values(
            arguments, SHORT, "scripts.curves", "model=DIR data=NAME_OR_FILE", ("model", "data")
        )
        heads, out = given.pop("heads", "batch,wait_k,entropy").split(","), given.pop("out", None)
        given = {
            "recipe": "proactivellm",
            "log.wandb": "disabled",
            "data.path": given["eval.path"],
        } | given
        config = compose([f"{key}={value}" for key, value in given.items()])
        config.proactive.curve = heads
        out = Path(out) if out else _place(Path(config.model.path))
        if not out.parent.is_dir():
            raise ConfigError(f"out={out}: there is no folder {out.parent}; make it")
        print(json.dumps(write(config, out)))
        return 0
    except OnstreamError as error:
        print_error(error)
        return 1


def _place(model: Path) -> Path:
    run = model.resolve().parents[2] if len(model.resolve().parents) > 2 else model
    return (run if (run / "metrics.jsonl").is_file() else Path()) / "curves.json"


def of_run(config, run_dir: Path) -> None:
    """The curves of a run's last checkpoint. A collective."""
    config.model.path = str(run_dir / "checkpoints" / f"step_{config.train.steps}" / "model")
    write(config, run_dir / "curves.json")


def write(config, out: Path) -> dict:
    """Sweep `proactive.curve` for `model.path` on the evaluation data, write the JSON to `out`
    beside what it has of them, and return it. A collective.

    Raises:
        OnstreamError: a head, the model or the data cannot be used.
    """
    from recipes.components import DECISION_HEADS
    from rollouts.simultaneous.decision import check_heads
    from scripts.evaluate import load
    from trainers.core.distributed import rank
    from trainers.core.evaluation import eval_path, evaluate
    from trainers.modes.rollout import make_sampling
    from trainers.modes.simultaneous_metrics import calibrate

    check_heads(config.proactive)
    parts = load(config)
    limit = config.eval.max_new_tokens or config.rollout.max_new_tokens
    sampling = make_sampling(config, parts.tokenizer, parts.stop_ids, max_new_tokens=limit)
    about = {
        "model": _place_of(config.model.path),
        "data": parts.name,
        "prompts": len(parts.prompts),
        "measured": {
            "path": _place_of(eval_path(config)),
            "split": config.eval.split,
            "unit": config.streaming.unit,
            "temperature": config.eval.temperature,
            "max_new_tokens": limit,
        },
    }
    policies: dict[str, list[dict]] = {}
    for name in config.proactive.curve:
        kind = DECISION_HEADS.resolve(name)
        label = name + (_bounds(config.proactive) if kind.adaptive else "")
        policies[label] = []
        quantiles, settings = [None] * len(kind.sweep), kind.sweep
        if kind.calibrated:
            recorder = calibrate(kind, config, parts.rollout, parts.tokenizer, sampling)
            quantiles, settings = QUANTILES, [recorder.quantile(share) for share in QUANTILES]
        for share, setting in zip(quantiles, settings):
            config.proactive.head, config.proactive.setting = name, setting
            scores, _ = evaluate(
                parts.rollout,
                parts.prompts,
                config,
                parts.tokenizer,
                parts.stop_ids,
                parts.verifier,
            )
            point = {"setting": setting} | ({} if share is None else {"quantile": share})
            policies[label].append(
                point
                | {
                    figure: scores[figure] if math.isfinite(scores[figure]) else None
                    for figure in FIGURES
                }
            )
            if rank() == 0:
                print(
                    f"curve  {label} {setting:.3g}: "
                    + "  ".join(f"{figure} {scores[figure]:.3g}" for figure in FIGURES),
                    file=sys.stderr,
                )
    parts.rollout.close()
    curves = about | {"quality": "bleu", "lag": "al", "policies": _there(out, about) | policies}
    if rank() == 0:
        out.write_text(json.dumps(curves, indent=1))
    return curves


def _there(file: Path, about: dict) -> dict[str, list[dict]]:
    """The curves that a file has of the same model and data."""
    try:
        curves = json.loads(file.read_text())
        return curves["policies"] if {key: curves.get(key) for key in about} == about else {}
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def _place_of(name: str) -> str:
    """The whole path of what is here; the Hub's names stay."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _bounds(options) -> str:
    """What makes a head another one than its name says."""
    low, high, most = options.min_lag, options.max_lag, options.max_reads
    lag = f", lag {low} to {'any' if high is None else high}" if low or high is not None else ""
    return (
        lag
        + (f", at most {most} reads" if most else "")
        + ("" if options.whole_words else ", at every token")
    )


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))
