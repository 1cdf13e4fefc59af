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

from scripts.cli import next_steps, print_error, quiet_libraries, quiet_torch


def main(overrides: list[str]) -> int:
    """Run; returns the exit status. A mistake of the user's ends in one line on stderr.

    A run that SIGTERM or SIGUSR1 ended has saved a checkpoint, and its status is 143.
    """
    from recipes.compose import compose, to_yaml
    from recipes.errors import OnstreamError

    rank = int(os.environ.get("RANK", "0"))
    try:
        if {"--help", "-h"} & set(overrides):
            from recipes.help import help_text

            print(help_text([text for text in overrides if not text.startswith("-")]))
            return 0
        config = compose(overrides)
        quiet_torch()
        from trainers.prepare import prepare

        run = prepare(config)
        if config.dry_run:
            if rank == 0:
                print(to_yaml(run.config), end="")
                print(
                    f"# ok: {len(run.prompts)} prompts, sequences of up to {run.max_length} tokens"
                )
            return 0
        from trainers.loop import Loop

        loop = Loop(run)
        if not loop.fit():
            from trainers.core.preemption import EXIT_STATUS

            return EXIT_STATUS
        try:
            loop.finish()
        finally:
            if rank == 0:
                from scripts.report import write_report

                print(f"report {write_report(run.directory)}")
        if rank == 0:
            print(next_steps(config, run.directory))
        return 0
    except OnstreamError as error:
        print_error(error)
        return 1


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    quiet_libraries()
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if status != 1 and "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        # All is written and closed. Without the libraries' own ends, of which one has aborted a
        # finished rank.
        os._exit(status)
    sys.exit(status)
