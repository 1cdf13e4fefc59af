"""KL and agreement with a teacher, against the whole distributions written out."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.compose import compose
from rollouts.trajectory import Trajectory
from scripts import divergence
from trainers.modes import reading_mode
from trainers.run import Run


def test_against_the_distributions_written_out(tiny_models):
    config = compose(
        [
            "recipe=opd",
            f"model.path={tiny_models['student']}",
            f"teacher.path={tiny_models['teacher']}",
        ]
    )
    run = Run(config=config, mode=reading_mode(config), vocab=490)
    drawn = [Trajectory(0, 0, [5, 6], [7, 8, 9], "stop"), Trajectory(1, 0, [9], [4, 3], "stop")]
    kl, agrees = divergence.compare(run, drawn)
    assert len(kl) == len(agrees) == 5
    expected, same = [], []
    for trajectory in drawn:
        ids = torch.tensor([[*trajectory.prompt_ids, *trajectory.completion_ids]])
        first = len(trajectory.prompt_ids) - 1
        logps = [
            AutoModelForCausalLM.from_pretrained(tiny_models[name], dtype=torch.float32)(ids)
            .logits[0, first:-1, :490]
            .log_softmax(-1)
            for name in ("student", "teacher")
        ]
        for own, other in zip(*logps):
            expected.append(float((own.exp() * (own - other)).sum()))
            same.append(bool(own.argmax() == other.argmax()))
    assert sorted(kl.tolist()) == pytest.approx(sorted(expected), abs=1e-5)
    assert int(agrees.sum()) == sum(same)


def test_a_model_has_no_divergence_from_itself(tiny_models, capsys):
    path = tiny_models["student"]
    keys = [f"model={path}", f"teacher={path}", "data=stories", "size=3", "engine=hf"]
    assert divergence.main([*keys, "max_new_tokens=6"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["prompts"] == 3 and result["tokens"] == 18
    assert math.isclose(result["kl"], 0, abs_tol=1e-6) and result["agreement"] == 1


def test_rows_need_no_answer_and_both_models_must_have_a_token(
    tiny_models, tmp_path, capsys, monkeypatch
):
    """Rows without an answer were refused, and the vocabulary was that of the model alone."""
    teacher = tmp_path / "teacher"
    # A head without a row for the last token, as where a tokenizer has grown.
    smaller = AutoModelForCausalLM.from_pretrained(tiny_models["teacher"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["teacher"])
    smaller.resize_token_embeddings(len(tokenizer) - 1)
    smaller.save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "The sky is"}\n{"prompt": "A dog", "answer": "7"}\n')
    keys = [f"model={tiny_models['student']}", f"teacher={teacher}", f"data={file}", "engine=hf"]
    vocabularies = []
    compare = divergence.compare
    monkeypatch.setattr(
        divergence,
        "compare",
        lambda run, drawn: vocabularies.append(run.vocab) or compare(run, drawn),
    )
    assert divergence.main([*keys, "max_new_tokens=8"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["prompts"] == 2 and 0 < result["kl"] < math.inf
    assert "dropped" not in printed.err
    assert vocabularies == [len(tokenizer) - 1]


def test_another_vocabulary_is_refused(tiny_models, capsys):
    keys = [f"model={tiny_models['student']}", "teacher=translation-untrained", "data=stories"]
    assert divergence.main(keys) == 1
    assert "has another vocabulary than model.path=" in capsys.readouterr().err
