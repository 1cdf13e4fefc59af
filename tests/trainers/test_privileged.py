"""A teacher that reads another prompt than the student, and a student that teaches itself."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.compose import compose
from recipes.errors import ConfigError, DataError
from rollouts.trajectory import Trajectory
from trainers.core.deepspeed import PolicyEngine
from trainers.core.policy import load_policy
from trainers.core.teacher import DetachedHead, SelfTeacher, Teacher
from trainers.core.teachers import make_one
from trainers.loop import Loop
from trainers.prepare import prepare

CPU = torch.device("cpu")
WORKER = """
import json, sys, train
for arguments in map(json.loads, sys.argv[1:]):
    assert train.main(arguments) == 0
"""


@pytest.fixture
def prepared(overrides):
    """A run of PowerOPD that is ready to load its models, of these keys."""

    def make(**keys):
        defaults = {"rollout__engine": "hf", "eval__every": -1}
        return prepare(compose(overrides(**defaults | keys)))

    return make


@pytest.fixture
def rows(tmp_path):
    """Writes a file of rows; returns its path."""

    def write(*made):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in made))
        return file

    return write


def decoded(run, index=0):
    return run.tokenizer.decode(run.teacher_prompts[index])


def test_the_fields_of_the_row_are_filled_in(prepared, rows):
    data = rows({"prompt": "1 + 1 {answer}", "solution": "It is 2.", "answer": "2"})
    run = prepared(data__path=data, teacher__prompt="'{prompt} | {solution} | {answer} frac{x}'")
    [prompt] = run.prompts
    # What a field holds is not filled in again, and other braces are the text's.
    expected = "1 + 1 {answer} | It is 2. | 2 frac{x}"
    assert decoded(run) == prompt.text.replace("1 + 1 {answer}", expected)
    assert any("teacher  reads prompts of its own" in message for message in run.messages)


def test_a_template_of_the_prompt_alone_is_the_students_prompt(prepared):
    run = prepared(teacher__prompt="{prompt}", data__suffix="'. Think.'")
    assert [run.teacher_prompts[p.index] for p in run.prompts] == [p.token_ids for p in run.prompts]


@pytest.mark.parametrize(
    "seen",
    [
        "Know that {solution}. 1 + 1",
        [{"role": "system", "content": "Hint: {answer}"}, {"role": "user", "content": "1 + 1"}],
    ],
)
def test_a_column_of_text_or_of_turns(prepared, rows, seen):
    row = {"prompt": "1 + 1", "solution": "it is 2", "answer": "2", "seen": seen}
    run = prepared(data__path=rows(row), teacher__prompt_column="seen")
    text = decoded(run)
    assert ("Know that it is 2" in text) if isinstance(seen, str) else ("Hint: 2" in text)
    assert "Hint" not in run.prompts[0].text and "Know" not in run.prompts[0].text


ROW = {"prompt": "1 + 1", "answer": "2"}


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        (ConfigError, {"teacher__prompt": "'{soluton}'"}, "{soluton}, which is no field"),
        (DataError, {"teacher__prompt": "'{solution}'"}, "row 0 has no solution"),
        (DataError, {"teacher__prompt_column": "hint"}, "no column 'hint' (teacher.prompt_column)"),
        (
            DataError,
            {"teacher__prompt_column": "hint", "data__path": "stories"},
            "is generated and has no columns",
        ),
        (
            ConfigError,
            {"teacher__prompt_column": "answer", "teacher__prompt": "x"},
            "are both given",
        ),
        (ConfigError, {"teacher__weights": "base"}, "use teacher.path=self"),
        (
            ConfigError,
            {"teacher__weights": "base", "teacher__path": "self"},
            "there are none; set model.lora.rank",
        ),
        (
            ConfigError,
            {"teacher__weights": "current", "teacher__path": "self"},
            "there is nothing to learn",
        ),
        (DataError, {"teacher__prompt": "x" * 20000}, "all 1 prompts of the teacher exceed"),
    ],
)
def test_what_is_refused(prepared, rows, kind, keys, said):
    with pytest.raises(kind) as caught:
        prepared(**{"data__path": rows(ROW)} | keys)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def policy_loop(run):
    """The loop's part that scores, without DeepSpeed."""
    policy = load_policy(run.config.model.path, torch.float32, CPU, missing=run.missing).eval()
    engine = object.__new__(PolicyEngine)
    engine.policy, engine.engine, engine.adapted, engine.config = policy, policy, {}, run.config
    loop = object.__new__(Loop)
    loop.run, loop.config, loop.engine = run, run.config, engine
    run.write_scores, run.policy_head = loop.write_scores, policy.head


@pytest.mark.parametrize("weights", ["frozen", "current"])
def test_the_teacher_scores_the_completion_after_its_own_prompt(prepared, weights):
    run = prepared(
        teacher__path="self", teacher__weights=weights, teacher__prompt="'Hint {answer}. {prompt}'"
    )
    policy_loop(run)
    teacher = make_one(run.config.teacher, run)
    assert type(teacher) is (Teacher if weights == "frozen" else SelfTeacher)
    rng, made = np.random.default_rng(0), []
    for prompt, length in zip(run.prompts, (7, 1, 12)):
        ids = rng.integers(3, 400, length)
        made.append(Trajectory(prompt.index, 0, list(prompt.token_ids), ids.tolist(), "length"))
        made[-1].annotations["teacher_targets"] = ids
    teacher.annotate(made, hidden=True)
    model = load_policy(run.config.model.path, torch.float32, CPU).model.eval()
    for trajectory in made:
        seen = run.teacher_prompts[trajectory.prompt_index]
        assert len(seen) > len(trajectory.prompt_ids)
        ids = torch.tensor([[*seen, *trajectory.completion_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(seen) - 1 : -1, : run.vocab]
        own = torch.tensor(trajectory.completion_ids)[:, None]
        expected = logits.log_softmax(-1).gather(-1, own)[:, 0]
        found = trajectory.annotations["teacher_logprobs"]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        states = torch.from_numpy(trajectory.annotations["teacher_hidden"])
        again = (states @ teacher.head.weight.T)[:, : run.vocab]
        torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)
    assert not teacher.head.weight.requires_grad or weights == "frozen"


def test_a_detached_head_follows_its_weight():
    head = torch.nn.Linear(2, 3)
    head.softcap = None
    detached = DetachedHead(head)
    head.weight.data = torch.ones(3, 2)
    assert torch.equal(detached.weight, torch.ones(3, 2)) and not detached.bias.requires_grad


def test_with_nothing_added_teacher_and_student_are_equal_to_the_bit(
    overrides, run_command, tmp_path, monkeypatch
):
    """So every reward is exactly 0, as a shift by one token or another packing would not have."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    keys = {
        "teacher__path": "self",
        "teacher__prompt": "{prompt}",
        "rollout__engine": "hf",
        "eval__every": -1,
    }
    settings = [
        {"teacher__weights": "current"},
        {"teacher__weights": "frozen", "objective": "reverse_kl"},
        {"teacher__weights": "current", "objective": "forward_kl"},
        {"teacher__weights": "base", "model__lora__rank": 2, "reward__token": "log_ratio"},
        # With something added they are not.
        {
            "teacher__weights": "current",
            "teacher__prompt": "'{answer} {prompt}'",
            "reward__token": "log_ratio",
        },
    ]
    runs = [tmp_path / f"run_{number}" for number in range(len(settings))]
    lines = [
        json.dumps(overrides(**keys | changes, run__dir=folder))
        for changes, folder in zip(settings, runs)
    ]
    done = run_command("-c", WORKER, *lines)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, changes in zip(runs, settings):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        sizes = [abs(row[f"reward/{end}"]) for row in rows for end in ("min", "max")]
        if changes.get("teacher__prompt"):
            assert max(sizes) > 1e-3
        else:
            assert len(rows) == 2 and not any(sizes)
            assert not any(row["train/grad_norm"] or row["teacher/kl"] for row in rows)


def test_first_tokens_may_be_left_out(prepared):
    run = prepared(teacher__skip_tokens=3)
    trainer = run.method(replace(run, teacher=_Silent()))
    made = [Trajectory(0, 0, [5], [7] * length, "length") for length in (2, 5)]
    trainer.annotate(made)
    assert [t.annotations["mask"].tolist() for t in made] == [[False] * 2, [False] * 3 + [True] * 2]


class _Silent:
    def annotate(self, trajectories, hidden=False):
        """Scores nothing."""
