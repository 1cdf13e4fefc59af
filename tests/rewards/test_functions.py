"""Reward functions and services beside the verifier: weights, failures, the run that goes on."""

import json
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from recipes.compose import compose
from recipes.errors import ConfigError, TrainingError
from rewards.calls import Question
from rewards.functions import Functions
from rewards.verification import verdicts
from trainers.loop import Loop
from trainers.prepare import prepare

QUESTIONS = [Question(text, ("7",), "p", {"index": i}) for i, text in enumerate(("7", "a", "bcd"))]


@pytest.fixture
def mine(monkeypatch):
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def functions(*overrides: str) -> Functions:
    return Functions(compose(["recipe=grpo", *overrides]).reward)


def of(mine, function, *overrides: str) -> Functions:
    mine.f = function
    keys = [f"reward.functions.f.{override}" for override in overrides]
    return functions("reward.functions.f.path=mine.f", *keys)


def test_a_function_gets_what_it_names(mine):
    def each(completion, answer, row, prompt, limit):
        return row["index"] + limit * len(completion) + (answer == "7") / 2 + len(prompt)

    found = of(mine, each, "kwargs.limit=10").score(QUESTIONS)
    assert [scores.values["f"] for scores in found] == [11.5, 12.5, 33.5]

    def batch(completions, answers):
        return [len(text) for text in completions]

    assert [s.values["f"] for s in of(mine, batch).score(QUESTIONS)] == [1, 1, 3]
    assert [v.score for v in verdicts(batch, QUESTIONS, 1)] == [1, 1, 3]
    with pytest.raises(ConfigError, match=r"reward.functions.f \(mine.f\) cannot be called: .*lim"):
        of(mine, each, "kwargs.lim=10")


@pytest.mark.parametrize(
    "broken, reason",
    [
        (lambda text: 1 / (len(text) - 1), "ZeroDivisionError: division by zero (test_functions"),
        (lambda text: float("nan") if len(text) == 1 else 1, "nan is not finite"),
        (lambda text: "high" if len(text) == 1 else 1, "'high' is no number"),
        (lambda text: sys.exit(1) if len(text) == 1 else 1, "SystemExit: 1"),
        (lambda text: time.sleep(9) if len(text) == 1 else 1, "TimeoutError: not answered within"),
    ],
)
def test_a_failure_has_its_default_and_without_one_ends_the_run(mine, broken, reason):
    found = of(mine, lambda c, a: broken(c), "default=-1", "seconds=0.1").score(QUESTIONS)
    assert [s.values["f"] for s in found][:2] == [-1, -1] and found[2].values["f"] > 0
    assert found[0].failures["f"].startswith(reason) and not found[2].failures
    with pytest.raises(TrainingError, match=r"f \(mine.f\) failed on row 0: .*f.default"):
        of(mine, lambda c, a: broken(c), "seconds=0.1").score(QUESTIONS)


def test_the_first_failure_is_said_and_three_whole_steps_end_the_run(mine):
    said, found = [], of(mine, lambda c, a: 1.0, "default=0")
    found.account(1, [(3, {}), (4, {"f": "why"})], said.append)
    found.account(2, [(3, {"f": "why"}), (4, {})], said.append)
    assert said == [
        "step 1: reward.functions.f (mine.f) failed for 1 of 2 completions, first on row 4: why; "
        "0 counts"
    ]
    for step in (3, 4):
        found.account(step, [(3, {"f": "why"})], said.append)
    assert len(said) == 3
    with pytest.raises(TrainingError, match="it gave no score for 3 steps"):
        found.account(5, [(3, {"f": "why"})], said.append)


@pytest.fixture(scope="module")
def server():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(body)
            kind, status = self.path.strip("/"), 200
            count = len(body["completions"])
            answer = {"scores": [len(text) for text in body["completions"]]}
            text = json.dumps(answer)
            if kind == "busy":
                status = 503 if len(seen) < 3 else 200
            elif kind == "garbage":
                text = "<html>"
            elif kind == "wrong":
                text = json.dumps({"scores": [1.0] * (count + 1)})
            elif kind == "nan":
                text = '{"scores": [NaN, null, 2]}'
            elif kind == "slow":
                time.sleep(1)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    seen: list[dict] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()


@pytest.mark.parametrize(
    "kind, scores, reason",
    [
        ("good", [1, 1, 3], None),
        ("busy", [1, 1, 3], None),
        ("garbage", [-1, -1, -1], "ServiceError: the answer is no JSON: '<html>'"),
        ("wrong", [-1, -1, -1], "ServiceError: 4 scores for 3 completions"),
        ("nan", [-1, -1, 2], "nan is not finite"),
        ("slow", [-1, -1, -1], "LaterError: ReadTimeout"),
    ],
)
def test_a_service(server, kind, scores, reason):
    url, seen = server
    seen.clear()
    seconds = 0.3 if kind == "slow" else 5
    service = functions(
        f"reward.functions.s.url={url}/{kind}",
        f"reward.functions.s.seconds={seconds}",
        "reward.functions.s.default=-1",
        "reward.functions.s.kwargs.depth=2",
    )
    found = service.score(QUESTIONS)
    assert [s.values["s"] for s in found] == scores
    assert (found[0].failures.get("s") or "").startswith(reason or "")
    assert bool(found[0].failures) == (reason is not None)
    assert seen[0] == {
        "completions": ["7", "a", "bcd"],
        "prompts": ["p"] * 3,
        "answers": ["7"] * 3,
        "kwargs": {"depth": 2},
    }


def rows(overrides, tmp_path, name: str, *keys: str) -> list[dict]:
    """The rows of a GRPO run."""
    folder = tmp_path / name
    short = {"rollout__samples_per_prompt": 4, "train__prompts_per_step": 2, "eval__every": -1}
    given = overrides(recipe="grpo", run__dir=folder, rollout__engine="hf", **short)
    loop = Loop(prepare(compose([*given, "train.minibatches=1", "grpo.gamma=0", *keys])))
    loop.fit()
    loop.finish()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_grpo_run_learns_from_the_weighted_sum_and_goes_on_where_one_fails(
    mine, overrides, tmp_path, capsys
):
    seen = []

    def letters(completion, answer):
        return sum(map(str.isalpha, completion)) / 10

    def shaky(completions):
        seen.extend(completions)
        return [float("nan") if index % 2 else 1.0 for index in range(len(completions))]

    mine.letters, mine.shaky = letters, shaky
    alone = ["reward.verifier_weight=0", "reward.functions.a.path=mine.letters"]
    both = rows(
        overrides,
        tmp_path,
        "both",
        *alone,
        "reward.functions.a.weight=0.5",
        "reward.functions.b.path=mine.shaky",
        "reward.functions.b.weight=2",
        "reward.functions.b.default=-1",
    )
    steps = [row for row in both if "reward/a/mean" in row]
    assert len(steps) == 2 and len(seen) == 16
    for row in steps:
        assert row["reward/b/mean"] == 0 and row["reward/b/failed"] == 4
        expected = 0.5 * row["reward/a/mean"] + 2 * row["reward/b/mean"]
        assert row["reward/mean"] == pytest.approx(expected, abs=1e-9) and expected > 0
        assert row["train/grad_norm"] > 0
    assert capsys.readouterr().out.count("(mine.shaky) failed for 4 of 8 completions") == 1

    function = rows(overrides, tmp_path, "function", *alone, "train.steps=1")
    verifier = rows(
        overrides, tmp_path, "verifier", "reward.verifier=mine.letters", "train.steps=1"
    )
    for name in ("train/loss", "train/grad_norm", "reward/mean"):
        values = [[row[name] for row in found if name in row] for found in (function, verifier)]
        assert values[0] == values[1] and len(values[0]) == 1
