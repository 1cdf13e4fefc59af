"""Entry point: compose the config, check everything, build the parts, train.

    torchrun --nproc_per_node=N train.py recipe=poweropd key=value …
    python train.py recipe=poweropd …            the same with one rank
"""
from __future__ import annotations

import os
import sys
import warnings


def main(overrides: list[str]) -> int:
    """Run; returns the exit status. A mistake of the user's ends in one line on stderr and status 1."""
    from recipes.compose import compose
    from recipes.errors import OnstreamError

    rank = int(os.environ.get("RANK", "0"))
    try:
        config = compose(overrides)
        quiet()
        from scripts.tiny_models import make_embedded_models
        make_embedded_models(config)
        from trainers.prepare import prepare
        prepared = prepare(config)
        if config.dry_run:
            if rank == 0:
                from omegaconf import OmegaConf
                print(OmegaConf.to_yaml(config), end="")
                print(f"# ok: {len(prepared.prompts)} prompts, sequences of up to {prepared.max_length} tokens")
            return 0
        from trainers.loop import Loop
        run_dir = Loop(config, prepared).fit()
        try:
            if config.proactive.curve and prepared.eval_prompts and config.train.steps:
                from scripts.curves import of_run
                of_run(config, run_dir)
        finally:
            if rank == 0:
                from scripts.report import write_report
                print(f"report {write_report(run_dir)}")
        return 0
    except OnstreamError as error:
        place = f" (rank {rank})" if rank else ""
        print(f"error{place}: {error}", file=sys.stderr)
        return 1


def quiet() -> None:
    """Keep the libraries' progress bars and start-up remarks out of the run's output."""
    import torch
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it warns it guessed
    from transformers.utils import logging
    logging.disable_progress_bar()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 0 and "torch" in sys.modules:
        import torch.distributed as dist
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(status)
