"""A rollout engine for test_lora.py whose weights are gone while it sleeps, as vLLM's on a GPU."""

import torch

from rollouts.engines.huggingface import HuggingFaceEngine


class SleepingEngine(HuggingFaceEngine):
    state, sleeps = "ready", 0

    @torch.no_grad()
    def sleep(self) -> None:
        self.state, self.sleeps = "asleep", self.sleeps + 1
        for parameter in self.parameters.values():
            parameter.fill_(torch.nan)

    def wake(self) -> None:
        self.state = "empty"

    def load_weights(self, weights) -> None:
        assert self.state != "asleep"
        super().load_weights(weights)
        self.state = "ready"

    def generate(self, *arguments, **options):
        assert self.state == "ready"
        return super().generate(*arguments, **options)

    def close(self) -> None:
        print(f"asleep {self.sleeps} times, at the end {self.state}")
        super().close()
