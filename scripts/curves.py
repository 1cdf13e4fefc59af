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
import sys
from pathlib import Path

from scripts.cli import print_error, quiet_libraries

HEADS = "batch,wait_k,entropy"


def main(arguments: list[str]) -> int:
    """Returns the exit status; a mistake of the user's ends in one line on stderr."""
    from recipes.compose import compose
    from recipes.errors import OnstreamError
    from scripts.evaluate import SHORT, key_values

    try:
        given = key_values(
            arguments, SHORT, "scripts.curves", "model=DIR data=NAME_OR_FILE", ("model", "data")
        )
        heads, out = given.pop("heads", HEADS), given.pop("out", None)
        defaults = {
            "recipe": "proactivellm",
            "log.wandb": "disabled",
            "data.path": given["eval.path"],
            "proactive.curve": f"[{heads}]",
        }
        config = compose([f"{key}={value}" for key, value in (defaults | given).items()])
        print(json.dumps(sweep(config, out)))
        return 0
    except OnstreamError as error:
        print_error(error)
        return 1


def sweep(config, out: str | None) -> dict:
    """Sweep `proactive.curve` for `model.path`, and write the curves.

    Raises:
        OnstreamError: a head, the model or the data cannot be used.
    """
    from recipes.errors import ConfigError
    from rollouts.simultaneous.decision import check_heads
    from trainers.evaluation import evaluate
    from trainers.modes.curves import write_curves
    from trainers.prepare import prepare_evaluation

    file = Path(out) if out else default_file(Path(config.model.path))
    if not file.parent.is_dir():
        raise ConfigError(f"out={file}: there is no folder {file.parent}; make it")
    check_heads(config.proactive)
    run = prepare_evaluation(config)
    curves = write_curves(run, config.proactive.curve, file, config.model.path, evaluate)
    run.rollout.close()
    return curves


def default_file(model: Path) -> Path:
    """curves.json in the run that a model is a checkpoint of, else here."""
    parents = model.resolve().parents
    run = parents[2] if len(parents) > 2 else model
    return (run if (run / "metrics.jsonl").is_file() else Path()) / "curves.json"


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))
