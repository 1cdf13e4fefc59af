"""The plain reading mode: what a completion is scored against, how prompt and target join, and what
an error names."""

from types import SimpleNamespace

import pytest
from tokenizers import processors

from recipes.compose import compose
from recipes.errors import DataError
from rollouts.data.examples import Example, Prompt
from rollouts.data.load import load_examples
from rollouts.trajectory import Trajectory
from scripts.new_model import learn_tokenizer
from trainers.modes import reading_mode
from trainers.sft import SupervisedFineTuning

PLAIN = ["recipe=sft", "data.template=plain", "data.max_prompt_tokens=64"]


def scored(example, text, verifier):
    mode = reading_mode(compose(PLAIN))
    tokenizer = SimpleNamespace(decode=lambda ids: text)
    trajectory = Trajectory(0, 0, [9], [1, 2], "stop")
    run = SimpleNamespace(tokenizer=tokenizer, verifier=verifier)
    mode.score_all(run, [Prompt(0, (9,), "", example)], [trajectory])
    return trajectory


def test_any_of_several_right_answers_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "Capital?", "reward_model": {"ground_truth": {"target": ["Paris", "City"]}}}\n'
    )
    (example,) = load_examples(str(path))
    for text, score in (("Paris", 1.0), ("City", 1.0), ("Rome", 0.0)):
        made = scored(example, text, lambda text, answer: float(text == answer))
        assert made.score == score and made.answer == "Paris"
    # The best of scores that are neither right nor wrong.
    made = scored(example, "Cit", lambda text, answer: len(text) / len(answer))
    assert made.score == 3 / 4


def test_an_example_without_an_answer_has_no_score():
    made = scored(Example(0, []), "Paris", lambda text, answer: 1.0)
    assert made.score is None and made.answer is None


@pytest.fixture(scope="module")
def tokenizer():
    """One that appends its end token to every text."""
    tokenizer = learn_tokenizer(["The sky is blue."], 300)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert tokenizer("a").input_ids[-1] == tokenizer.eos_token_id
    return tokenizer


def test_a_plain_prompt_goes_on_in_its_target(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "The sky is", "completion": " blue."}\n')
    config = compose([*PLAIN, f"data.path={path}"])
    (prompt,), _ = reading_mode(config).prompts(load_examples(str(path)), tokenizer, "data")
    trainer = SupervisedFineTuning(SimpleNamespace(config=config, tokenizer=tokenizer))
    trajectory = trainer.read(prompt)
    assert tokenizer.decode(trajectory.token_ids) == f"The sky is blue.{tokenizer.eos_token}"


def test_prompts_that_are_all_too_long_name_their_data(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "The sky is blue."}\n')
    mode = reading_mode(compose([*PLAIN, "data.max_prompt_tokens=1"]))
    with pytest.raises(DataError) as caught:
        mode.prompts(load_examples(str(path)), tokenizer, f"data.path={path}")
    said = str(caught.value)
    assert said.startswith(f"data.path={path}: all 1 prompts are longer than 1 tokens")
    assert "data.max_prompt_tokens" in said
