"""What a model's own configs say: its end tokens, and sampling settings that transformers refuses
to save."""

import json
import shutil
import time

import pytest
import torch

from recipes.errors import ModelError
from trainers.core import memory
from trainers.core.policy import check_model, load_policy

CPU = torch.device("cpu")


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
    policy = load_policy(str(model), torch.float32, CPU)
    policy.model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved.get("temperature") == (0.6 if settings.get("do_sample") else None)


# Each with the dropout that its family has, at a share that no gradient survives unchanged.
FAMILIES = {
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "resid_pdrop": 0.5,
        "embd_pdrop": 0.5,
        "attn_pdrop": 0.5,
    },
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "attention_dropout": 0.5,
    },
    # Its layers call dropout as a function, under their own flag, and drop whole layers.
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "dropout": 0.5,
        "attention_dropout": 0.5,
        "layerdrop": 0.5,
    },
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_dropout": 0.5,
        "hidden_dropout": 0.5,
    },
}


def gradients(folder, dropout, checkpointing) -> list[torch.Tensor]:
    """Of one loss on two packed sequences, as the engine has a policy make them."""
    policy = load_policy(str(folder), torch.float32, CPU)
    policy.start_training(dropout, checkpointing)
    ids = torch.arange(3, 23)[None]
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    hidden = policy._states(ids, positions, [0, 12, 20])
    hidden.square().sum().backward()
    return [p.grad for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_off_in_updates_unless_it_is_asked_for(family, checkpointing, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 0}
    config = AutoConfig.for_model(family, **common, eos_token_id=0, **FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    free = {name: 0.0 for name in FAMILIES[family] if "drop" in name}
    for name, value in free.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path / "free")

    off = gradients(tmp_path / "model", False, checkpointing)
    assert len(off) > 10
    for other in (
        gradients(tmp_path / "model", False, checkpointing),
        gradients(tmp_path / "free", True, False),
    ):
        assert all(torch.equal(a, b) for a, b in zip(off, other, strict=True))
    on = gradients(tmp_path / "model", True, checkpointing)
    assert len(on) != len(off) or any(not torch.equal(a, b) for a, b in zip(off, on))


def test_checkpointing_still_computes_again_where_dropout_is_off(tiny_models):
    """It saves fewer activations for the backward pass."""

    def saved(checkpointing) -> int:
        policy = load_policy(str(tiny_models["student"]), torch.float32, CPU)
        policy.start_training(False, checkpointing)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            policy._states(torch.arange(20)[None], torch.arange(20)[None], [0, 20])
        return len(kept)

    assert saved(True) < saved(False) / 3


def test_a_model_larger_than_the_memory_is_refused_before_it_loads(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models["student"], tmp_path / "large")
    change(folder / "config.json", hidden_size=2**17, intermediate_size=2**19)
    started = time.perf_counter()
    with pytest.raises(ModelError, match=r"has \d+\.\d billion parameters: \d+ GiB in float32"):
        load_policy(str(folder), torch.float32, CPU)
    assert time.perf_counter() - started < 20
    assert memory.parameter_count(str(tiny_models["student"]), False) == sum(
        p.numel() for p in load_policy(str(tiny_models["student"]), torch.float32, CPU).parameters()
    )


def test_ranks_of_a_machine_share_a_cpus_memory(monkeypatch):
    alone = memory.memory_of(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert memory.memory_of(CPU) == alone // 8
