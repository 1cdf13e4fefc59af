"""Removing layers: the model that skips them, saved as a normal folder, and mistakes."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from recipes.errors import ModelError
from recipes.smaller_models import remove_layers
from scripts.remove_layers import main
from trainers.core.policy import check_model, load_policy

IDS = torch.tensor([[5, 17, 3, 40, 8, 29]])
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    # Layers of two types in turn: full attention, and a window of three tokens.
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=3)),
}


def skipped(model, layers) -> torch.Tensor:
    """The logits [1, T, V] of the whole model, in which some layers pass on what they get."""
    hooks = [
        model.model.layers[index].register_forward_hook(
            lambda module, inputs, output: inputs[0] if inputs else None
        )
        for index in layers
    ]
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("layers", [(1,), (0, 3), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_smaller_model_is_the_whole_one_that_skips_them(kind, layers, tmp_path):
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    whole, expected = model(IDS, use_cache=False).logits, skipped(model, layers)
    assert not torch.allclose(expected, whole, atol=1e-3)
    remove_layers(model, layers)
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert loaded.config.num_hidden_layers == 5 - len(layers)
    for smaller in (model, loaded):
        with torch.no_grad():
            torch.testing.assert_close(smaller(IDS, use_cache=False).logits, expected)
            # Token by token: each layer writes to its own place in the cache.
            cache = DynamicCache(config=smaller.config)
            steps = [
                smaller(IDS[:, [t]], past_key_values=cache).logits for t in range(IDS.shape[1])
            ]
        torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-5, rtol=1e-5)


def test_types_of_layers_stay_with_their_layers():
    model = KINDS["gemma2"]()
    before = list(model.config.layer_types)
    remove_layers(model, [1])
    assert before[0] != before[1] and model.config.layer_types == [before[0], *before[2:]]


def test_a_folder_that_a_run_can_start_from(tmp_path, capsys):
    folder = tmp_path / "smaller"
    assert main(["model=stories-student", "layers=1", f"out={folder}"]) == 0
    assert f"{folder}: 2 of 3 layers, " in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["smaller"]
    tokenizer, config = check_model("model.path", str(folder))
    whole, _ = check_model("model.path", "stories-student")
    assert config.num_hidden_layers == 2 and tokenizer.get_vocab() == whole.get_vocab()
    assert tokenizer.stop_ids == whole.stop_ids
    assert AutoTokenizer.from_pretrained(folder).chat_template == whole.chat_template
    load_policy(str(folder), torch.float32, torch.device("cpu"))
    saved = json.loads((folder / "config.json").read_text())
    assert saved["dtype"] == "bfloat16"  # as the whole model


def test_a_model_without_a_list_of_layers_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2))
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no list of 2 layers"):
        remove_layers(model, [0])


@pytest.mark.parametrize(
    "setting",
    [{"mlp_only_layers": [1]}, {"first_k_dense_replace": 1}, {"decoder_sparse_step": 2}],
)
def test_settings_by_the_index_of_a_layer_are_refused(setting):
    """The folder was written, and its layers were made anew at random when it was loaded."""
    model = KINDS["gemma2"]()
    for name, value in setting.items():
        setattr(model.config, name, value)
    with pytest.raises(ModelError, match=next(iter(setting))):
        remove_layers(model, [0])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["layers=1", "out=OUT"], "model=… is missing"),
        (["model=stories-student", "out=OUT"], "layers=… is missing"),
        (["model=stories-student", "layers=1", "out=."], "out=. exists"),
        (["model=stories-student", "layers=1", "out=OUT", "layer=2"], "there is no key 'layer'"),
        (["model=stories-student", "layers=1;2", "out=OUT"], "layers=1;2 must be whole numbers"),
        (["model=stories-student", "layers=", "out=OUT"], "layers= must be whole numbers"),
        (["model=stories-student", "layers=-1", "out=OUT"], "layers=-1 must be whole numbers"),
        (["model=stories-student", "layers=1,1", "out=OUT"], "layers=1,1 names a layer twice"),
        (["model=stories-student", "layers=1,3", "out=OUT"], "no layer 3; its are 0 to 2"),
        (["model=stories-student", "layers=0,1,2", "out=OUT"], "all 3 layers would be removed"),
        (["model=stories-studnet", "layers=1", "out=OUT"], "did you mean 'stories-student'?"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, arguments, said):
    assert main([argument.replace("OUT", str(tmp_path / "out")) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not list(tmp_path.iterdir())
