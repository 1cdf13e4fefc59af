"""What the commands share: quiet libraries, and errors that are the last line on the screen."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

# Waits, up to a minute, for the end of the process it is given (a zombie has ended), then prints a
# line.
PRINT_AFTER = """
import os, select, sys
try:
    select.select([os.pidfd_open(int(sys.argv[1]))], [], [], 60)
except OSError:
    pass  # it is gone, or the system has no such handles
print(sys.argv[2], file=sys.stderr, flush=True)
"""


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and start-up remarks out of the output. To be called before
    they load."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)


def quiet_torch() -> None:
    """The same for what can only be told when torch is loaded."""
    import logging

    import torch

    # it remarks that there is no Triton
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    # else it warns it guessed
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def print_error(error: Exception) -> None:
    """Print an error's one line on stderr.

    torchrun follows a failed rank with a report of its own. So under torchrun the line is printed once more when that
    is over, as the last one on the screen.
    """
    rank = os.environ.get("RANK", "0")
    place = "" if rank == "0" else f" (rank {rank})"
    line = f"error{place}: {error}"
    print(line, file=sys.stderr, flush=True)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # In a session of its own: torchrun ends what is left of its ranks' sessions.
        subprocess.Popen(
            [sys.executable, "-S", "-c", PRINT_AFTER, str(os.getppid()), line],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )


def next_steps(config, run_dir: Path) -> str:
    """What to do with a finished run: lines with commands that work as they are, from the
    checkout."""
    python = ".venv/bin/python" if sys.prefix.endswith("/.venv") else "python"
    run, model = str(run_dir), run_dir / "checkpoints" / f"step_{config.train.steps}" / "model"
    lines = ["next", f"  open {shlex.quote(run)}/report.html in a browser"]
    if config.recipe == "poweropd" and config.data.path == "stories":
        other = shlex.quote(f"{run}-opd")
        lines += [
            "  compare with vanilla on-policy distillation, at its own best learning rate",
            f"    {python} train.py recipe=opd run.dir={other}",
            f"    {python} -m scripts.report {shlex.quote(run)} {other}",
            "  train your own: put your folders and file in the place of these",
            f"    {python} train.py recipe=poweropd model.path=stories-student "
            "teacher.path=stories-teacher data.path=stories",
        ]
    data = config.eval.path or config.data.path
    streams = getattr(getattr(config, "streaming", None), "layout", None) is not None
    if not streams and data in ("stories", "translation") and model.is_dir():
        lines += [
            "  measure what was saved",
            f"    {python} -m scripts.evaluate model={shlex.quote(str(model))} data={data} k=4",
        ]
    return "\n".join(lines)
