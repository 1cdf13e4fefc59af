"""Qwen2-Audio in two parts, tiny and random: the same language model, the same encoder but
causal."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
)

from recipes.compose import compose
from recipes.errors import DataError, ModelError
from rollouts.simultaneous.frames import load_encoder
from scripts import new_model, split_qwen2_audio
from trainers.core.policy import check_model
from trainers.prepare import prepare

BINS, POSITIONS = 6, 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    assert (
        new_model.main(
            [
                f"out={folder / 'words'}",
                "data=translation",
                "data.stories=50",
                "hidden=32",
                "layers=1",
                "heads=2",
            ]
        )
        == 0
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "words")
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(
            audio_config={
                "d_model": 16,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "num_mel_bins": BINS,
                "max_source_positions": POSITIONS,
            },
            text_config={
                "model_type": "qwen2",
                "hidden_size": 24,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": len(tokenizer),
                "eos_token_id": tokenizer.eos_token_id,
            },
        )
    )
    with torch.no_grad():  # transformers starts biases and positions with 0
        for part in (model.model.audio_tower, model.model.multi_modal_projector):
            for parameter in part.parameters():
                parameter.normal_(std=0.3)
    model.eval().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    assert split_qwen2_audio.main([f"model={folder / 'model'}", f"out={folder / 'parts'}"]) == 0
    return model, folder / "parts"


def test_the_language_model_is_the_same(whole):
    model, parts = whole
    _, config = check_model("model.path", str(parts / "text"))
    assert config.model_type == "qwen2"
    ids = torch.arange(12)[None] + 5
    ours = AutoModelForCausalLM.from_pretrained(parts / "text")(ids).logits
    assert torch.equal(ours, model(input_ids=ids).logits)


def test_the_encoder_is_the_original_after_two_frames_of_zeros_under_a_causal_mask(whole):
    model, parts = whole
    frames = torch.randn(29, BINS, generator=torch.Generator().manual_seed(1))
    # which proves it causal
    ours = load_encoder(f"rollouts.simultaneous.qwen2_audio.load:{parts / 'speech'}")(frames)
    silent = torch.zeros(1, BINS, 2 * POSITIONS)
    silent[0, :, 2 : 2 + len(frames)] = frames.T
    mask = torch.full((POSITIONS, POSITIONS), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        heard = model.model.audio_tower(silent, attention_mask=mask).last_hidden_state
        expected = model.model.multi_modal_projector(heard)[0, :8]
        unmasked = model.model.multi_modal_projector(
            model.model.audio_tower(silent).last_hidden_state
        )[0, :8]
    assert ours.shape == (8, 24) and torch.allclose(ours, expected, atol=1e-5)
    assert not torch.allclose(unmasked, expected, atol=1e-2)


def test_the_recipe_is_ready_for_them(whole, tmp_path):
    _, parts = whole
    frames = np.random.default_rng(0).normal(size=(37, BINS)).astype(np.float32)
    np.save(tmp_path / "a.npy", frames)
    (tmp_path / "rows.jsonl").write_text('{"audio": "a.npy", "text": "rarin lalun"}\n')
    config = compose(
        [
            "recipe=proactivellm_speech",
            f"model.path={parts / 'text'}",
            f"data.path={tmp_path / 'rows.jsonl'}",
            f"model.encoder=rollouts.simultaneous.qwen2_audio.load:{parts / 'speech'}",
            "data.template=plain",
            "streaming.unit_seconds=0.2",
            f"run.dir={tmp_path / 'run'}",
        ]
    )
    prepared = prepare(config)
    # 10 embeddings, and the end
    assert [len(unit) for unit in prepared.prompts[0].segments[1:]] == [5, 5 + 1]
    np.save(tmp_path / "a.npy", np.concatenate([frames, frames]))
    with pytest.raises(
        DataError, match=r"row 0 lasts 0\.74 s; model\.encoder hears at most 0\.4 s; cut it"
    ):
        prepare(config)


def test_what_cannot_be_split_or_loaded(whole, tiny_models, tmp_path, capsys):
    for arguments, said in (
        (
            [f"model={tiny_models['student']}", f"out={tmp_path / 'new'}"],
            "is a qwen3 model; this splits",
        ),
        (["model=/no/such", f"out={tmp_path / 'new'}"], "model=/no/such cannot be loaded"),
        (["model=x", f"out={tmp_path}"], "exists; give a new folder"),
        (["model=x"], "out=… is missing"),
        (["model=x", "out=y", "to=z"], "there is no key 'to'"),
    ):
        assert split_qwen2_audio.main(arguments) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    with pytest.raises(ModelError, match="holds no speech encoder; write one with"):
        load_encoder(f"rollouts.simultaneous.qwen2_audio.load:{tmp_path}")
