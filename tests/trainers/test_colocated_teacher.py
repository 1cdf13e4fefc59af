"""A teacher that vLLM runs beside the process: the same numbers, or one line."""

from dataclasses import replace

import numpy as np
import pytest

from recipes.compose import compose
from recipes.errors import ConfigError, ModelError, TeacherError
from rollouts.trajectory import Trajectory
from trainers.core.served_requests import is_served
from trainers.core.teacher import Teacher
from trainers.core.teachers import make_one, teacher_sections
from trainers.prepare import prepare

KEYS = ["recipe=poweropd", "rollout.engine=hf", "eval.every=-1", "teacher.engine=vllm"]


@pytest.fixture
def prepared(tmp_path):
    def make(*keys):
        folder = ["data.stories=64", f"run.dir={tmp_path / 'run'}"]
        return prepare(compose([*KEYS, *folder, *keys]))

    return make


def solutions(run) -> list[Trajectory]:
    """Stories with their solutions, and one of random ids that ends on the teacher's stop token."""
    made = []
    for prompt in run.prompts[:32]:
        ids = run.tokenizer.encode(prompt.example.solution, add_special_tokens=False)[:80]
        made.append(Trajectory(prompt.index, 0, list(prompt.token_ids), ids, "length"))
    made[-1].completion_ids[:] = np.random.default_rng(0).integers(3, 400, 30).tolist()
    for trajectory in made:
        trajectory.annotations["teacher_targets"] = np.array(trajectory.completion_ids)
    made[-1].annotations["teacher_targets"][-1] = run.teacher_stop
    return made


@pytest.mark.slow
def test_the_engine_and_a_teacher_in_process_agree(prepared):
    # A template, and rows of the head that are no tokens of the student.
    run = prepared("teacher.prompt='Know {answer}. {prompt}'")
    run.vocab, run.missing = run.vocab - 3, (7,)
    teacher = make_one(run.config.teacher, run)
    scored, again, local = solutions(run), solutions(run), solutions(run)
    teacher.annotate(scored)
    Teacher(run.config.teacher, run).annotate(local)
    for name in ("teacher_logprobs", "teacher_max_logprobs"):
        values = [
            np.concatenate([t.annotations[name] for t in trajectories])
            for trajectories in (scored, local)
        ]
        gaps = np.abs(values[0] - values[1])
        print(f"{name}: {len(gaps)} tokens, largest {gaps.max():.2g}, mean {gaps.mean():.2g} nats")
        assert gaps.max() < 1e-3 and gaps.mean() < 1e-5
    # Nothing is taken from a cache: one half after the other gives what both together gave.
    for half in (again[:16], again[16:]):
        teacher.annotate(half)
    for one, two in zip(again, scored):
        gaps = one.annotations["teacher_logprobs"] - two.annotations["teacher_logprobs"]
        assert np.abs(gaps).max() < 1e-3
    # vLLM refuses what is longer than its room, and that ends in one line.
    again[0].prompt_ids *= 40
    run.teacher_prompts.clear()
    process = teacher.engine.process
    with pytest.raises(TeacherError, match="^teacher.engine=vllm: .*; resume the run") as caught:
        teacher.annotate(again)
    assert "\n" not in str(caught.value)
    with pytest.raises(TeacherError, match="process has ended with status 0"):
        teacher.annotate(scored)
    assert process.poll() == 0


@pytest.mark.slow
def test_an_engine_that_does_not_start_ends_in_one_line(prepared, tmp_path):
    run = prepared()
    section = replace(run.config.teacher, path=str(tmp_path))
    with pytest.raises(ModelError, match="vllm cannot load") as caught:
        make_one(section, run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            ["objective=reverse_kl"],
            "objective=reverse_kl compares whole distributions, and teacher",
        ),
        (["rollout.temperature=0.7"], "teacher.engine=vllm serves log-probs at temperature 1"),
        (["teacher.path=self"], "teacher.engine=vllm goes with the name of a model"),
        (["teacher.rest=true"], "teacher.rest=true is of a frozen teacher in this process"),
    ],
)
def test_what_the_engine_cannot_give_is_refused(prepared, keys, said):
    with pytest.raises(ConfigError) as caught:
        prepared(*keys)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_sequences_need_room_for_one_token_more(prepared):
    run = prepared()
    longest = max(len(prompt.token_ids) for prompt in run.prompts)
    with pytest.raises(
        ModelError, match="takes .* tokens, and a sequence may have .* and one more"
    ):
        prepared(f"rollout.max_new_tokens={2048 - longest}")


def test_one_of_several_may_be_an_engine(prepared):
    named = ["teachers.a.path=stories-teacher", "teachers.b.path=stories-student"]
    run = prepared(*named, "teachers.b.engine=hf")
    assert [is_served(section) for section in teacher_sections(run.config).values()] == [
        True,
        False,
    ]
