"""Check rewards and objectives by exact enumeration (docs/conformance.md).

    python -m scripts.conform                                    all that come with the project
    python -m scripts.conform objective=jsd                      those of one component
    python -m scripts.conform reward.token=my_rewards.Margin     one of your own
    python -m scripts.conform trainer=my_trainer.Mine recipe=opd

A policy of a few hundred float64 weights has 40 completions. The code that trains runs on each of
them, and its mean gradient is compared with that of the stated objective. Each line is a case:
component, property, setting, and `ok` or what differs. The exit status is 1 where one differs.

Other keys of the config may follow a component of your own.
"""

from __future__ import annotations

from recipes.errors import OnstreamError
from scripts.cli import key_values, launch, quiet_torch, run_command

SHORT_KEYS = {
    "reward": "reward.token",
    "verifier": "reward.verifier",
    "engine": "rollout.engine",
    "objective": "objective",
    "trainer": "trainer",
    "recipe": "recipe",
}


class NonconformingError(OnstreamError):
    """A component does something else than it states; the message counts the cases."""


def main(arguments: list[str]) -> int:
    """Check what the arguments name; returns the exit status."""
    return run_command(conform, arguments, __doc__, SHORT_KEYS)


def conform(arguments: list[str]) -> None:
    """Print a line per case, then the summary.

    Raises:
        NonconformingError: a case differs.
    """
    values = key_values(arguments, SHORT_KEYS, module="scripts.conform")
    # torch takes a second to load; help does not need it.
    import torch

    from trainers.conformance import report, suite

    # The tensors are tiny: a second thread costs more than it does.
    torch.set_num_threads(1)
    quiet_torch()
    results, seconds = report.run_all(suite.chosen(values), lambda line: print(line, flush=True))
    total = report.summary(results, seconds)
    if any(result.difference for result in results):
        raise NonconformingError(f"{total}; the lines that do not end in ok say which")
    print(total)


if __name__ == "__main__":
    launch(main)
