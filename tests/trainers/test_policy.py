"""What a model's own configs say: its end tokens, and sampling settings that transformers refuses
to save."""

import json
import shutil

import pytest
import torch

from trainers.core.policy import check_model, load_policy


@pytest.fixture
def model(tiny_models, tmp_path):
    return shutil.copytree(tiny_models["student"], tmp_path / "model")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_end_tokens_of_both_configs_count(model):
    change(model / "config.json", eos_token_id=[7, 8])
    change(model / "generation_config.json", eos_token_id=9)
    tokenizer, _ = check_model("model.path", str(model))
    assert set(tokenizer.stop_ids) == {tokenizer.eos_token_id, 7, 8, 9}
    (model / "generation_config.json").unlink()
    assert {7, 8} <= set(check_model("model.path", str(model))[0].stop_ids)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
        {"do_sample": False, "temperature": 0.6, "min_p": 0.1},
        {"do_sample": True, "temperature": 0.6, "top_k": 20},
    ],
)
def test_a_model_with_sampling_settings_can_be_saved(model, tmp_path, settings):
    change(model / "generation_config.json", **settings)
    policy = load_policy(str(model), torch.float32, torch.device("cpu"))
    policy.model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved.get("temperature") == (0.6 if settings.get("do_sample") else None)
