"""A method that reads its sequences needs the rollout engine in evaluations only."""

import pytest

import train

# Like vLLM on a GPU: asleep, the engine cannot do anything, and its weights are gone.
ENGINE = """
from rollouts.engines.huggingface import HuggingFaceEngine

log = []


class Sleeper(HuggingFaceEngine):
    asleep = False

    def sleep(self):
        for parameter in self.parameters.values():
            parameter.fill_(float("nan"))
        self.asleep = True
        log.append("sleep")

    def wake(self):
        self.asleep = False
        log.append("wake")

    def load_weights(self, weights):
        assert not self.asleep
        super().load_weights(weights)
        log.append("load")

    def generate(self, requests, *arguments, **options):
        assert not self.asleep
        log.append("generate")
        return super().generate(requests, *arguments, **options)
"""


@pytest.fixture
def log(tmp_path, monkeypatch):
    (tmp_path / "sleeper.py").write_text(ENGINE)
    monkeypatch.syspath_prepend(tmp_path)
    import sleeper

    return sleeper.log


def test_the_engine_sleeps_between_evaluations(overrides, log):
    keys = overrides(recipe="sft", rollout__engine="sleeper.Sleeper", train__steps=3, eval__every=2)
    evaluation = ["wake", "load", "generate"]
    assert train.main([*keys, "checkpoint.every=1"]) == 0
    assert log == [*evaluation, "sleep", *evaluation, "sleep", *evaluation]
    log.clear()
    assert train.main([*keys, "train.steps=4", "resume=auto"]) == 0
    assert log == ["load", "sleep", *evaluation]
