"""The keys of the rewards of whole completions: verifier, functions beside it, code that runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from recipes.components import VERIFIERS
from recipes.errors import ConfigError
from recipes.schema.keys import free, key


@dataclass(frozen=True)
class CodeConfig:
    enabled: bool = key(
        False, "Let the verifier code run programs that the model writes, on this machine."
    )
    isolated: bool = key(
        True,
        "Run a program without a network, and where it sees Python, the system's libraries and an "
        "empty folder alone. Needs Linux with user namespaces. false: the limits below alone, and "
        "the program can reach whatever you can.",
    )
    seconds: float = key(5.0, "Seconds that a program may take, of any clock.", above=0)
    memory_gib: float = key(0.5, "Address space of a process of a program, GiB.", above=0)
    disk_mib: int = key(16, "Size of what a program may write, MiB.", at_least=1)
    processes: int = key(8, "Number of processes and threads of a program.", at_least=1)
    parallel: int = key(2, "Number of programs that a rank runs at once.", at_least=1)


@dataclass(frozen=True)
class RewardConfig:
    verifier: str = key(
        "math",
        "Function that scores a completion against the answer. Its score is logged, and is the "
        "reward of the methods that learn from one. code: the share of completions whose program "
        "passes the answer's tests; needs reward.code.enabled.",
        component=VERIFIERS,
    )
    seconds_per_batch: float = key(
        120.0,
        "Seconds that the slow answers of a batch share, on each rank: those whose check takes "
        "longer than 0.05 s. What is then unchecked counts as wrong, and in reward/timeouts. A "
        "batch is a step's completions, or an evaluation's. Of reward.functions: the seconds that "
        "a function has for a batch.",
        above=0,
    )
    code: CodeConfig = field(default_factory=CodeConfig)


@dataclass(frozen=True)
class FunctionConfig:
    path: str | None = key(
        None,
        "Function, as for reward.verifier: its name, or a dotted path. null: url is given.",
        component=VERIFIERS,
    )
    url: str | None = key(None, "Address of a service that gives the scores, http or https.")
    weight: float = key(1.0, "Weight of its score in the reward.")
    default: float | None = key(
        None, "Score of a completion where it fails or is late. null: the run then ends."
    )
    seconds: float = key(
        30.0,
        "Seconds that a call may take: for a completion, or for the batch where the function takes "
        "a batch. A service is asked again within them.",
        above=0,
    )
    batch: int | None = key(
        None, "Number of completions in a request to a service. null: a rank's.", at_least=1
    )
    kwargs: dict[str, Any] = free("Keyword argument of the function, or the service.")  # noqa: RUF009


@dataclass(frozen=True)
class SequenceRewardConfig(RewardConfig):
    """What methods that learn from the reward of a whole completion read."""

    verifier_weight: float = key(
        1.0,
        "Weight of the verifier's score in the reward. 0: it is logged alone, and rows need no "
        "answer.",
    )
    # Rewards beside the verifier, by name.
    functions: dict[str, FunctionConfig] = field(default_factory=dict)


def check(config: Any) -> None:
    """Refuse a reward function without a function, or with two.

    Raises:
        ConfigError: one line that names the key.
    """
    weights = {"verifier_weight": getattr(config.reward, "verifier_weight", 1.0)}
    for name, options in getattr(config.reward, "functions", {}).items():
        where = f"reward.functions.{name}"
        weights |= {
            f"functions.{name}.{key}": getattr(options, key) for key in ("weight", "default")
        }
        if (options.path is None) == (options.url is None):
            both = "a path and a url" if options.path else "neither a path nor a url"
            raise ConfigError(
                f"{where} has {both}; set {where}.path=MODULE.FUNCTION or {where}.url=http://…"
            )
        if options.url is not None and not options.url.startswith(("http://", "https://")):
            raise ConfigError(f"{where}.url={options.url} must begin with http:// or https://")
        if options.batch is not None and options.url is None:
            raise ConfigError(f"{where}.batch={options.batch} is of a service, and there is no url")
    for name, weight in weights.items():
        if weight is not None and not math.isfinite(weight):
            raise ConfigError(f"reward.{name}={weight} must be finite")
