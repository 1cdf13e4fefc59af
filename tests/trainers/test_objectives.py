"""Every reward and objective by exact enumeration, and the eight silent mistakes planted."""

import re
import time
from pathlib import Path

import pytest
import torch

from recipes.components import TOKEN_REWARDS
from recipes.errors import ConfigError
from scripts.conform import main
from trainers.conformance import report, suite
from trainers.conformance.generic import check_sampler
from trainers.conformance.report import Difference
from trainers.conformance.subjects import Setup
from trainers.conformance.token_rewards import method
from trainers.conformance.world import Tree, tree

ROOT = Path(__file__).resolve().parents[2]


def example(name: str) -> str:
    """A file of the README."""
    return re.search(rf"```python\n# {name}\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]


@pytest.fixture(autouse=True)
def path(monkeypatch):
    """The planted mistakes are on the path, as a user's modules are."""
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.fixture(scope="module")
def results():
    """The results, and the seconds of processor time; others may share the core."""
    started = time.process_time()
    found, _ = report.run_all(suite.cases())
    return found, time.process_time() - started


def test_every_case_agrees(results):
    found, seconds = results
    assert len(found) > 250
    assert [result.line() for result in found if result.difference] == []
    assert seconds < 60


def test_every_component_has_a_case(results):
    covered = {result.case.component for result in results[0]}
    assert set(suite.components()) <= covered
    assert {"trainer=hrpo", "objective=topk", "reward.verifier=exact"} <= covered


def test_a_component_without_a_case_fails_by_itself(monkeypatch):
    monkeypatch.setitem(TOKEN_REWARDS, "margin", "my_rewards.Margin")
    (case,) = (case for case in suite.cases() if case.component == "reward.token=margin")
    assert "no case checks it" in report.run(case).difference


def test_the_completions_are_all_there_are():
    nodes = tree(3)
    assert len(nodes.completions) == 40 and len(nodes.prefixes) == 13
    setup = Setup(("recipe=opd",))
    logs = nodes.log_probs(setup.policy, (2, 3))
    total = sum(nodes.log_prob(logs, one).exp() for one in nodes.completions)
    assert float(total.detach()) == pytest.approx(1, abs=1e-12)
    assert len(Tree(2).completions) == 13


# Mistake, component, the properties that must differ, and what one of them says.
TRAPS = [
    (1, "trainer=K1", {"depends on the action", "sign"}, "the expected gradient is 0"),
    (1, "trainer=K3", {"stated objective"}, "cosine"),
    (
        2,
        "reward.token=Constant",
        {"depends on the action", "zero at equality"},
        "the same for every token",
    ),
    (
        2,
        "trainer=OfThePlace",
        {"depends on the action", "zero at equality"},
        "the expected gradient is 0",
    ),
    (3, "trainer=Shifted", {"zero at equality"}, "where teacher = student must be 0"),
    (4, "reward.token=Inverted", {"sign"}, "where lp - lq"),
    (4, "trainer=InvertedAdvantage", {"sign"}, "does not move towards the teacher"),
    (5, "trainer=PerMicroBatch", {"micro-batch split", "ranks"}, "gradient differs by"),
    (6, "trainer=OtherTemperature", {"sampler"}, "the sampler draws token"),
    (7, "trainer=CountsPadding", {"padding", "masked tokens", "ranks"}, "not finite"),
    (8, "rollout.engine=Stale", {"current weights"}, "samples from stale weights"),
    (8, "rollout.engine=Silent", {"current weights"}, "raised SyncError"),
]


@pytest.mark.parametrize("trap, component, properties, said", TRAPS)
def test_a_planted_mistake_is_caught(trap, component, properties, said):
    key, _, name = component.partition("=")
    path = f"planted_traps.{name}"
    found, _ = report.run_all(suite.chosen({key: path}))
    differing = {result.case.property: result.difference for result in found if result.difference}
    assert properties <= differing.keys(), [result.line() for result in found]
    assert any(said in differing[name] for name in properties), differing
    assert {result.case.component for result in found} == {f"{key}={path}"}


def test_a_truncated_sampler_is_noticed():
    """Mistake 6: top_p in the sampler and not in the trainer's log-probs."""
    with pytest.raises(Difference, match="the sampler draws token"):
        check_sampler(method("rollout.top_p=0.8").single())


def test_an_estimate_that_says_what_it_minimises_agrees():
    found, _ = report.run_all(suite.chosen({"trainer": "planted_traps.K3AsItIs"}))
    stated = [result for result in found if result.case.property == "stated objective"]
    assert [result.difference for result in stated] == [""]


def test_the_readmes_reward_and_trainer_conform(tmp_path, monkeypatch, capsys):
    for name in ("my_rewards.py", "my_trainer.py"):
        (tmp_path / name).write_text(example(name))
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["reward=my_rewards.Margin"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"reward.token=my_rewards.Margin +sign +ok", shown)
    assert re.search(r"\d+ cases of 1 components in [\d.]+ s: \d+ ok, 0 differ", shown)
    assert main(["trainer=my_trainer.RejectionSampling"]) == 0


def test_the_command_fails_where_a_case_differs(capsys):
    assert main(["reward=planted_traps.Inverted"]) == 1
    shown = capsys.readouterr()
    assert "reward" in shown.out and "where lp - lq" in shown.out
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1


def test_the_command_takes_a_registered_component_alone():
    chosen = suite.chosen({"objective": "jsd"})
    assert {case.component for case in chosen} == {"objective=jsd"} and len(chosen) > 5
    with pytest.raises(ConfigError, match="objective=jdd is no component"):
        suite.chosen({"objective": "jdd"})


def test_a_comparison_says_what_differs():
    ours, stated = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])
    with pytest.raises(Difference, match=r"cosine 1.000000, size 2 times"):
        report.agree(ours, stated)
    with pytest.raises(Difference, match="must be 0"):
        report.agree(ours, torch.zeros(2))
    with pytest.raises(Difference, match="not finite"):
        report.agree(ours * torch.nan, stated)
