"""What the commands share: quiet libraries, and errors that are the last line on the screen."""
from __future__ import annotations

import os
import subprocess
import sys

# Waits for a process to end, then prints: `python -c PRINT_AFTER pid line`.
PRINT_AFTER = """
import os, sys, time
pid, line = int(sys.argv[1]), sys.argv[2]
for _ in range(1200):
    try:
        os.kill(pid, 0)
    except OSError:
        break
    time.sleep(0.05)
print(line, file=sys.stderr, flush=True)
"""


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and start-up remarks out of the output. To be called before they load."""
    for name, value in {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error",
                        "TORCH_CPP_LOG_LEVEL": "ERROR", "VLLM_LOGGING_LEVEL": "ERROR"}.items():
        os.environ.setdefault(name, value)


def quiet_torch() -> None:
    """The same for what can only be told when torch is loaded."""
    import torch
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it warns it guessed
    from transformers.utils import logging
    logging.disable_progress_bar()


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
        subprocess.Popen([sys.executable, "-S", "-c", PRINT_AFTER, str(os.getppid()), line], start_new_session=True)


def next_steps(config, run_dir) -> str:
    """What to do with a finished run: lines with commands that work as they are, from the checkout."""
    python = ".venv/bin/python" if sys.prefix.endswith("/.venv") else "python"
    model = f"{run_dir}/checkpoints/step_{config.train.steps}/model"
    lines = ["next", f"  open {run_dir}/report.html in a browser"]
    if config.recipe == "poweropd" and config.data.path == "stories":
        lines += ["  compare with vanilla on-policy distillation, at its own best learning rate",
                  f"    {python} train.py recipe=opd run.dir={run_dir}-opd",
                  f"    {python} -m scripts.report {run_dir} {run_dir}-opd",
                  "  train your own: give your folders and file instead of these",
                  f"    {python} train.py recipe=poweropd model.path=stories-student teacher.path=stories-teacher "
                  "data.path=stories"]
    if config.streaming.layout is None:
        lines += ["  measure what was saved",
                  f"    {python} -m scripts.evaluate model={model} data={config.eval.path or config.data.path} k=4"]
    return "\n".join(lines)
