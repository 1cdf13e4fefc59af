"""What the commands share: KEY=VALUE arguments, `--help`, and errors of one line.

Each script's `main(arguments)` returns the exit status, so tests call it in their own process.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from recipes.errors import ConfigError, OnstreamError

HELP_FLAGS = ("--help", "-h")
# A program for another process. It waits for the end of a process, for a minute at most, and then
# prints a line. A zombie counts as ended.
PRINT_AFTER = """
import os, select, sys
try:
    select.select([os.pidfd_open(int(sys.argv[1]))], [], [], 60)
except OSError:
    pass  # it is gone, or the system has no such handles
print(sys.argv[2], file=sys.stderr, flush=True)
"""


def launch(main: Callable[[list[str]], int]) -> None:
    """Run a script's `main` on the command line, and end the process with its status."""
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))


def run_command(
    command: Callable[[list[str]], None],
    arguments: list[str],
    docstring: str,
    keys: Mapping[str, str],
) -> int:
    """Run a command, or print its help where the arguments ask for it.

    Args:
        command: does the work. An OnstreamError that it raises becomes one line on stderr.
        docstring: that of the command's module.
        keys: the command's own keys; each with the config key that it stands for, or its meaning.

    Returns:
        the exit status: 0, or 1 after an error.
    """
    try:
        if any(flag in arguments for flag in HELP_FLAGS):
            # The schema of the config takes a moment to load; only help needs it here.
            from recipes.help import command_help

            print(command_help(docstring, keys))
        else:
            command(arguments)
    except OnstreamError as error:
        print_error(error)
        return 1
    return 0


def key_values(
    arguments: list[str],
    short_keys: Mapping[str, str],
    module: str,
    usage: str = "",
    required: Sequence[str] = (),
) -> dict[str, str]:
    """Parse arguments of the form KEY=VALUE; short keys become those of the config.

    Args:
        short_keys: the config key of each short key.
        module: the script's module, for messages.
        usage: arguments that work, for the message on a missing key.
        required: keys that must be given, as the user writes them.

    Raises:
        ConfigError: an argument has another form, or a required key is missing.
    """
    values = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"'{argument}' is not KEY=VALUE; see python -m {module} --help")
        values[short_keys.get(key, key)] = value
    for key in required:
        if short_keys.get(key, key) not in values:
            raise ConfigError(f"{key}=… is missing: python -m {module} {usage}")
    return values


def whole_number(key: str, text: str, least: int) -> int:
    """The value of a script's own key.

    Raises:
        ConfigError: the text is no whole number of at least `least`.
    """
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{key}={text} must be a whole number, {least} or more")
    return int(text)


def compose_values(values: Mapping[str, str]):
    """The config with these values.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value.
    """
    # Hydra takes a moment to load; help and argument errors do not need it.
    from recipes.compose import compose

    return compose([f"{key}={value}" for key, value in values.items()])


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and start-up remarks out of the output.

    It has an effect only on libraries that are loaded later.
    """
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)


def quiet_torch() -> None:
    """Silence the remarks that can be silenced only when torch is loaded."""
    import logging

    import torch

    # Without this, torch remarks that there is no Triton.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    # Without this, DeepSpeed warns that it guessed the accelerator.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def print_error(error: Exception) -> None:
    """Print an error's one line on stderr.

    After a failed rank, torchrun prints a report of its own. Under torchrun the line is therefore
    printed again after that report, as the last line on the screen.
    """
    rank = os.environ.get("RANK", "0")
    place = "" if rank == "0" else f" (rank {rank})"
    line = f"error{place}: {error}"
    print(line, file=sys.stderr, flush=True)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        torchrun = os.getppid()
        # The session is new, because torchrun ends the processes left in its ranks' sessions.
        subprocess.Popen(
            [sys.executable, "-S", "-c", PRINT_AFTER, str(torchrun), line],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )


def next_steps(config, run_dir: Path) -> str:
    """What to do with a finished run: lines with commands that work in the checkout as they are."""
    python = ".venv/bin/python" if sys.prefix.endswith("/.venv") else "python"
    run = shlex.quote(str(run_dir))
    lines = ["next", f"  open {run}/report.html in a browser"]
    if config.recipe == "poweropd" and config.data.path == "stories":
        baseline = shlex.quote(f"{run_dir}-opd")
        lines += [
            "  compare with vanilla on-policy distillation, at its own best learning rate",
            f"    {python} train.py recipe=opd run.dir={baseline}",
            f"    {python} -m scripts.report {run} {baseline}",
            "  train your own: put your folders and file in the place of these",
            f"    {python} train.py recipe=poweropd model.path=stories-student "
            "teacher.path=stories-teacher data.path=stories",
        ]
    model = run_dir / "checkpoints" / f"step_{config.train.steps}" / "model"
    data = config.eval.path or config.data.path
    if not reads_in_steps(config) and data in ("stories", "translation") and model.is_dir():
        lines += [
            "  measure what was saved",
            f"    {python} -m scripts.evaluate model={shlex.quote(str(model))} data={data} k=4",
        ]
    return "\n".join(lines)


def reads_in_steps(config) -> bool:
    """Whether a run's model reads in steps, which `scripts.evaluate` must be told by a mode."""
    streaming = getattr(config, "streaming", None)
    return getattr(streaming, "layout", None) is not None
