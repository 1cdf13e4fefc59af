"""Measures latency-quality curves of a simultaneous model: decision heads over their settings.

    python -m scripts.curves model=DIR data=NAME_OR_FILE
    python -m scripts.curves model=DIR data=NAME_OR_FILE heads=batch,wait_k,entropy out=FILE

The keys of `scripts.evaluate` work, and every other key of the config. wait_k, ratio and edatt are
swept over fixed values. entropy and attention are swept over quantiles of their scores on the
calibration set: `proactive.calibration_path`, or `data` of split `data.split`.

The figures also go to stdout as JSON. Curves of the same model and data that the file holds stay.
A run's report draws them. Training ends with the same sweep, for the heads in `proactive.curve`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from recipes.errors import ConfigError
from scripts.cli import compose_values, key_values, launch, print_error, run_command
from scripts.evaluate import SHORT_KEYS, load_run

HEADS = "batch,wait_k,entropy"
OWN_KEYS = {
    "heads": f"Decision heads to sweep, with commas between them; default: {HEADS}.",
    "out": "File that receives the figures; default: curves.json in the run that the model is a "
    "checkpoint of, else in this folder.",
}


def main(arguments: list[str]) -> int:
    """Sweep the heads that the arguments name; returns the exit status."""
    return run_command(print_curves, arguments, __doc__, SHORT_KEYS | OWN_KEYS)


def print_curves(arguments: list[str]) -> None:
    values = key_values(
        arguments,
        SHORT_KEYS,
        module="scripts.curves",
        usage="model=DIR data=NAME_OR_FILE",
        required=("model", "data"),
    )
    heads = values.pop("heads", HEADS)
    out = values.pop("out", None)
    defaults = {
        "recipe": "proactivellm",
        "log.wandb": "disabled",
        "data.path": values["eval.path"],
        "proactive.curve": f"[{heads}]",
    }
    config = compose_values(defaults | values)
    curves = sweep(config, out)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(curves))


def sweep(config, out: str | None) -> dict:
    """Sweep `proactive.curve` for `model.path`, and write the curves.

    Args:
        out: the file to write; None for the default one.

    Raises:
        OnstreamError: a head, the model or the data cannot be used.
    """
    from rollouts.simultaneous.decision import check_heads
    from trainers.core import failures, watchdog
    from trainers.evaluation import evaluate
    from trainers.modes.curves import write_curves

    file = Path(out or default_file(Path(config.model.path).expanduser())).expanduser()
    if not file.parent.is_dir():
        raise ConfigError(f"out={file}: there is no folder {file.parent}; make it")
    check_heads(config.proactive)
    with failures.watched(config.deadline, print_error):
        with watchdog.phase("load"):
            run = load_run(config)
        with watchdog.phase("report"):
            curves = write_curves(run, config.proactive.curve, file, config.model.path, evaluate)
            run.rollout.close()
    return curves


def default_file(model: Path) -> Path:
    """curves.json in the run that a model is a checkpoint of, else in this folder."""
    # RUN/checkpoints/step_N/model
    parents = model.resolve().parents
    run = parents[2] if len(parents) > 2 else model
    folder = run if (run / "metrics.jsonl").is_file() else Path()
    return folder / "curves.json"


if __name__ == "__main__":
    launch(main)
