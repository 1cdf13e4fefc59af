"""The entry point.

It composes the config, checks everything, loads the models and trains. One rank needs no torchrun.

    torchrun --nproc_per_node=N train.py recipe=poweropd key=value …
    python train.py recipe=poweropd …
    python train.py [recipe=NAME] --help
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from scripts.cli import next_steps, print_error, quiet_libraries, quiet_torch

# The exit status after Ctrl-C, as a shell gives it.
INTERRUPTED = 130


def main(overrides: list[str]) -> int:
    """Run; returns the exit status. A mistake of the user's ends in one line on stderr.

    A run that SIGTERM or SIGUSR1 ended has saved a checkpoint, and its status is 143. One that
    Ctrl-C ended has 130. A phase that is overdue ends the process with 124.
    """
    from recipes.compose import compose
    from recipes.errors import OnstreamError

    try:
        if {"--help", "-h"} & set(overrides):
            from recipes.help import help_text

            print(help_text([text for text in overrides if not text.startswith("-")]))
            return 0
        config = compose(overrides)
        quiet_torch()
        from trainers.core.failures import watched

        with watched(config.deadline, print_error) as dog:
            return train(config, dog)
    except OnstreamError as error:
        print_error(error)
        return INTERRUPTED if isinstance(error.__cause__, KeyboardInterrupt) else 1


def train(config, dog) -> int:
    """Check a run, and train; returns the exit status.

    Args:
        config: the run's.
        dog: the watchdog; it learns what to close where the run fails.

    Raises:
        OnstreamError: one line that says what is wrong.
    """
    from trainers.core import failures
    from trainers.prepare import prepare

    with dog.phase("load"):
        run = prepare(config)
        if config.dry_run:
            if dog.shown:
                show_dry_run(run)
            return 0
        from trainers.loop import Loop

        loop = Loop(run)
    dog.directory = run.directory
    dog.cleanup += failures.closing(loop)
    if dog.shown:
        dog.cleanup.append(("writing the report", lambda: report(run.directory)))
    if not loop.fit():
        from trainers.core.preemption import EXIT_STATUS

        return EXIT_STATUS
    loop.finish()
    if dog.shown:
        with dog.phase("report"):
            report(run.directory)
        print(next_steps(config, run.directory))
    return 0


def show_dry_run(run) -> None:
    """Print the config of a run that could start."""
    from recipes.compose import to_yaml

    print(to_yaml(run.config), end="")
    print(f"# ok: {len(run.prompts)} prompts, sequences of up to {run.max_length} tokens")


def report(directory: Path) -> None:
    """Write a run's report, where it has records."""
    records = directory / "metrics.jsonl"
    if records.is_file() and records.stat().st_size:
        from scripts.report import write_report

        print(f"report {write_report(directory)}", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    quiet_libraries()
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules:
        import torch.distributed as dist

        # After an error it could wait for a rank that is gone.
        if status in (0, 143) and dist.is_initialized():
            dist.destroy_process_group()
        # All is written and closed. Without the libraries' own ends, of which one has aborted a
        # finished rank.
        os._exit(status)
    sys.exit(status)
