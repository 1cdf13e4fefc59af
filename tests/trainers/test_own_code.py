"""Models that come with Python code, which runs where the user says so; an engine that sleeps."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from recipes.compose import compose
from recipes.errors import ModelError
from rollouts.engines.vllm import common_options
from rollouts.streaming.tokens import add_tokens, extend_model
from scripts import divergence, evaluate, remove_layers
from trainers.core.rollout import make_engine
from trainers.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
CODE = """
from pathlib import Path

from transformers import Qwen3Config, Qwen3ForCausalLM

Path({mark!r}).touch()


class OwnConfig(Qwen3Config):
    model_type = "own_decoder"


class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
"""
# Like vLLM on a GPU: asleep, the engine cannot do anything, and its weights are gone.
ENGINE = """
from rollouts.engines.huggingface import HuggingFaceEngine

def log(word):
    with open({log!r}, "a") as file:
        print(word, file=file)


class Sleeper(HuggingFaceEngine):
    asleep = False

    def sleep(self):
        for parameter in self.parameters.values():
            parameter.fill_(float("nan"))
        self.asleep = True
        log("sleep")

    def wake(self):
        self.asleep = False
        log("wake")

    def load_weights(self, weights):
        assert not self.asleep
        super().load_weights(weights)
        log("load")

    def generate(self, requests, *arguments, **options):
        assert not self.asleep
        log("generate")
        return super().generate(requests, *arguments, **options)
"""
KEYS = ("model.trust_remote_code=true", "teacher.trust_remote_code=true")


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    """The file that the model's code makes when it runs."""
    modules = str(tmp_path / "modules")
    monkeypatch.setenv("HF_MODULES_CACHE", modules)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
    return tmp_path / "the_code_ran"


@pytest.fixture
def model(tiny_models, tmp_path, mark) -> Path:
    """The tiny student as a model of a class that transformers does not have."""
    folder = shutil.copytree(tiny_models["student"], tmp_path / "own_model")
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own_decoder",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def keys(overrides, model):
    """A run in which the model is student and teacher."""
    return overrides(model__path=model, teacher__path=model, rollout__engine="hf", eval__every=-1)


def test_the_code_does_not_run_unless_it_is_trusted(keys, model, tiny_models, mark, capsys):
    with pytest.raises(ModelError, match=r"model\.path=.*model\.trust_remote_code=true$") as said:
        prepare(compose(keys))
    assert "can do whatever you can" in str(said.value)
    teacher = [*keys, f"model.path={tiny_models['student']}", KEYS[0]]
    with pytest.raises(ModelError, match=r"teacher\.path=.*teacher\.trust_remote_code=true$"):
        prepare(compose(teacher))
    assert evaluate.main([f"model={model}", "data=stories", "engine=hf"]) == 1
    assert "model.trust_remote_code=true" in capsys.readouterr().err
    assert remove_layers.main([f"model={model}", "layers=0", f"out={model}_small"]) == 1
    assert "model.trust_remote_code=true" in capsys.readouterr().err
    assert not mark.exists()


def test_a_class_of_a_known_config_needs_trust_too(keys, model, mark):
    auto_map = {"AutoModelForCausalLM": "own.OwnForCausalLM"}
    encoder = {"model_type": "distilbert", "vocab_size": 64, "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps(encoder))
    with pytest.raises(ModelError, match=r"model\.trust_remote_code=true"):
        prepare(compose(keys))
    assert not mark.exists()


def test_trusted_code_trains_and_the_engine_sleeps_between_evaluations(
    overrides, model, mark, run_command, tmp_path, monkeypatch
):
    """One run for both: a model with code of its own, and an engine that loses its weights."""
    (tmp_path / "sleeper.py").write_text(ENGINE.format(log=str(tmp_path / "log")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine = {"rollout__engine": "sleeper.Sleeper", "eval__every": 2, "train__steps": 3}
    keys = overrides(recipe="sft", model__path=model, **engine)
    done = run_command("train.py", *keys, KEYS[0])
    assert done.returncode == 0, done.stderr[-2000:]
    assert mark.exists() and "step 3/3" in done.stdout
    saved = tmp_path / "run" / "checkpoints" / "step_3" / "model"
    again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    assert type(again).__name__ == "OwnForCausalLM"
    evaluation = ["wake", "load", "generate"]
    log = (tmp_path / "log").read_text().split()
    # The parity gate draws from the engine as it was loaded.
    assert log == ["generate", *evaluation, "sleep", *evaluation, "sleep", *evaluation]


def test_the_key_reaches_every_engine_and_script(keys, model, mark, capsys):
    for name in ("opd", "adasr", "proactivellm"):
        chosen = [f"recipe={name}", f"model.path={model}", KEYS[0]]
        chosen += ["rollout.engine=hf"] if name == "opd" else []
        made = make_engine(compose(chosen), torch.device("cpu"), torch.float32, 64)
        assert type(made.model).__name__ == "OwnForCausalLM", name
    for value in (True, False):
        config = compose([*keys, f"model.trust_remote_code={value}"])
        assert common_options(str(model), config, torch.float32, 64)["trust_remote_code"] is value
    given = [f"model={model}", f"teacher={model}", "data=stories", "size=1", "engine=hf", *KEYS]
    assert divergence.main([*given, "max_new_tokens=2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kl"] == pytest.approx(0, abs=1e-6)
    out = f"{model}_small"
    assert remove_layers.main([f"model={model}", "layers=0", f"out={out}", KEYS[0]]) == 0
    assert Path(out, "own.py").is_file() and mark.exists()


def test_a_model_that_gets_tokens_keeps_its_code(model, mark, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    new = add_tokens(tokenizer)
    folder = extend_model(str(model), tokenizer, new, tmp_path / "start", trust_remote_code=True)
    assert (folder / "own.py").is_file()


def test_no_call_leaves_the_question_to_transformers():
    """Without an argument, it asks on a terminal whether to run a model's code."""
    calls = []
    for path in [*(ROOT / "trainers").rglob("*.py"), *(ROOT / "rollouts").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called.startswith("Auto") and called.endswith(".from_pretrained"):
                given = {keyword.arg for keyword in node.keywords}
                calls.append((path.name, node.lineno, "trust_remote_code" in given))
    assert len(calls) >= 3
    assert all(given for *_, given in calls), calls
