"""What a rollout engine offers: it draws completions, and takes the trainer's weights in place.

`rollout.engine` selects one of `recipes.components.ENGINES`, or a class by its dotted path. A run
constructs it as `Engine(path, config, device, dtype, max_length=…)`. The arguments are a model
folder or hub name, the run's config, the rank's device, the dtype of the weights, and the longest
sequence in tokens. tests/rollouts/test_conformance.py holds every engine to this interface.

An engine may have a static `check_model(path, config, max_length)`. It is called with the model's
config before any weight is read, and raises a ModelError for a model that the engine cannot sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from rollouts.trajectory import Request, Sampling, Trajectory


@runtime_checkable
class Engine(Protocol):
    """A rollout engine."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        continues: bool = False,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Trajectory]:
        """Draw one trajectory per request, in their order.

        A completion depends on its request's seed, not on the requests beside it, up to rounding.

        Args:
            requests: the prompts, with a seed each.
            sampling: limits, temperature and truncation, the same for all.
            continues: the prompts go on from those of the call before; cached prefixes may stay.
            on_finished: called again and again, with the number of completions just finished.

        Returns:
            trajectories whose `logprobs` [T] (float32, nats) are those of the sampled tokens at
            the sampling temperature, before truncation.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take the trainer's tensors in place; names are those of transformers' model.

        The iterable may be consumed lazily, as it gathers sharded parameters on the way.
        """
        ...

    def fingerprints(self, names: Sequence[str], salt: int) -> dict[str, int | None]:
        """The fingerprint (rollouts/sync.py) of each named tensor as the engine computes with it.

        None stands for a tensor that the engine does not hold.
        """
        ...

    def sleep(self) -> None:
        """Free memory for the update, as far as the engine can."""
        ...

    def wake(self) -> None:
        """Take the memory back. A weight sync follows before the next `generate`."""
        ...

    def close(self) -> None:
        """Free everything. The engine is not used again."""
        ...
