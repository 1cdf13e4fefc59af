"""LoRA and DoRA: gradients, merged weights, the reference, checkpoints, resumes, ZeRO stages."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from recipes.compose import compose
from recipes.errors import CheckpointError, ConfigError
from rollouts.trajectory import Trajectory
from trainers.core import lora
from trainers.core.deepspeed import PolicyEngine
from trainers.core.policy import load_policy
from trainers.loop import adapters
from trainers.prepare import prepare
from trainers.run import Run

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 30, 31, 32]])


def adapted(path, *keys, train_embeddings=False):
    """A policy with adapters that do something, and its config."""
    config = compose(["recipe=sft", "model.lora.rank=3", *keys])
    run = Run(config=config, mode=None, new_tokens=["x"] if train_embeddings else [])
    torch.manual_seed(0)
    policy = load_policy(str(path), torch.float32, CPU, adapt=adapters(run))
    for layer in lora.adapted_layers(policy.model).values():
        for parameter in lora.adapter_parameters(layer):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return policy, config


def engine_of(policy) -> PolicyEngine:
    """The engine without DeepSpeed, which wants a process of its own."""
    engine = object.__new__(PolicyEngine)
    engine.policy, engine.engine, engine.sharded = policy, policy, False
    engine.config = compose(["recipe=sft"])
    engine.adapted, engine.dtype = lora.adapted_layers(policy.model), torch.float32
    return engine


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def plain(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("dora", ["false", "true"])
def test_merged_weights_do_what_the_adapters_do(tiny_models, dora):
    policy, _ = adapted(tiny_models["student"], f"model.lora.dora={dora}")
    engine = engine_of(policy)
    model = plain(tiny_models["student"])
    start = logits(model)
    model.load_state_dict(dict(engine.weights()))
    torch.testing.assert_close(logits(model), logits(policy.model), atol=1e-5, rtol=1e-5)
    assert (logits(model) - start).abs().max() > 1e-2
    # Without the adapters it is the model that the run started from, to the bit.
    with lora.without_adapters(policy.model):
        assert torch.equal(logits(policy.model), start)
    torch.testing.assert_close(logits(policy.model), logits(model), atol=1e-5, rtol=1e-5)


def test_the_gradient_is_that_of_the_whole_weight_through_the_product(tiny_models):
    """W = W0 + s B A: dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW."""
    policy, _ = adapted(tiny_models["student"], "model.lora.alpha=6")
    model = plain(tiny_models["student"])
    layers = lora.adapted_layers(policy.model)
    for name, layer in layers.items():
        model.get_submodule(name).weight.data = lora.merged_weight(layer)
    for one in (model, policy.model):
        one.eval()(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in layers.items():
        whole = model.get_submodule(name).weight.grad
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(b.grad, 2 * whole @ a.T, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(a.grad, 2 * b.T @ whole, atol=1e-6, rtol=1e-3)


def test_only_adapters_learn(tiny_models):
    policy, _ = adapted(tiny_models["student"])
    learns = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert learns and all(lora.is_adapter(name) for name in learns)


def test_new_tokens_learn_too(tiny_models):
    policy, _ = adapted(tiny_models["student"], train_embeddings=True)
    assert policy.head.weight.requires_grad
    assert policy.model.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize(
    "name",
    ["lm_head", "embed_tokens", "no_such_layer", "q_proj,no_such_layer", "q_proj,all-linear"],
)
def test_layers_that_cannot_have_an_adapter(tiny_models, name):
    with pytest.raises(ConfigError) as caught:
        adapted(tiny_models["student"], f"model.lora.targets=[{name}]")
    message = str(caught.value)
    assert message.startswith(f"model.lora.targets=[{name}]: ") and "\n" not in message


@pytest.mark.parametrize("targets", ["all-linear", "gate", "down_proj"])
def test_experts_are_refused_before_a_merge_fails(targets):
    """peft adapts them as bare tensors, whose merged weights were looked for in `weight`."""
    config = Qwen3MoeConfig(
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
        num_experts=4,
        num_experts_per_tok=2,
    )
    options = compose(["recipe=sft", "model.lora.rank=3", f"model.lora.targets=[{targets}]"])
    with pytest.raises(ConfigError, match="router or a set of experts"):
        lora.add_adapters(AutoModelForCausalLM.from_config(config), options.model.lora)
    options = compose(["recipe=sft", "model.lora.rank=3", "model.lora.targets=[q_proj,v_proj]"])
    model = AutoModelForCausalLM.from_config(config)
    lora.add_adapters(model, options.model.lora)
    assert len(lora.adapted_layers(model)) == 2


@pytest.mark.parametrize("dora", ["false", "true"])
def test_dropout_is_on_in_updates_only(tiny_models, dora):
    """DoRA had none: peft asks the layer, not its dropout, whether it is training."""
    keys = ["model.lora.dropout=0.5", f"model.lora.dora={dora}"]
    policy, _ = adapted(tiny_models["student"], *keys)
    engine = engine_of(policy.eval())

    def states():
        with torch.no_grad():
            return policy.model(input_ids=IDS).logits

    engine._set_dropout(False)
    still = states()
    assert torch.equal(still, states())
    engine._set_dropout(True)
    assert not torch.equal(states(), states())
    engine._set_dropout(False)
    assert torch.equal(still, states())


def test_the_reference_is_the_policy_without_its_adapters(tiny_models):
    """It was a second copy of the model."""
    from trainers.core.teacher import AdapterlessPolicy, Reference
    from trainers.loop import Loop
    from trainers.modes import reading_mode

    policy, _ = adapted(tiny_models["student"])
    keys = ["recipe=grpo", "model.lora.rank=3", f"model.path={tiny_models['student']}"]
    config = compose(keys)
    run = Run(config=config, mode=reading_mode(config), vocab=498)
    loop = object.__new__(Loop)
    loop.run, loop.config, loop.engine = run, config, engine_of(policy)
    run.score_policy = loop.score_policy
    rng = np.random.default_rng(0)
    made = []
    for index in range(5):
        ids = rng.integers(3, 400, 9).tolist()
        made.append(Trajectory(index, 0, [5, 6], ids, "stop"))
        made[-1].annotations["mask"] = np.ones(9, bool)
    AdapterlessPolicy(run).annotate(made)
    ours = [trajectory.annotations.pop("reference_logprobs") for trajectory in made]
    Reference(run).annotate(made)
    for own, trajectory in zip(ours, made):
        assert np.array_equal(own, trajectory.annotations["reference_logprobs"])


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def adapter_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "stage, ranks, kind, sampler, dtype, dropout",
    [
        ("zero0", 0, "lora", "hf", "float32", 0.2),
        # vLLM seeds torch's generator as it starts, also at a resume.
        ("zero1", 0, "dora", "vllm", "float32", 0.2),
        ("zero2", 0, "lora", "hf", "bfloat16", 0),
        ("zero3", 2, "lora", "hf", "float32", 0.2),
        ("zero3", 2, "dora", "hf", "float32", 0),
    ],
)
def test_a_run_its_checkpoint_and_its_resume(
    tiny_models, overrides, run_command, tmp_path, stage, ranks, kind, sampler, dtype, dropout
):
    keys = {
        "recipe": "opd",
        "engine": stage,
        "model__dtype": dtype,
        "model__lora__rank": 3,
        "model__lora__dora": str(kind == "dora").lower(),
        "model__lora__dropout": dropout,
        "rollout__engine": sampler,
        "train__lr": 0.02,
        "train__warmup_steps": 0,
        "train__steps": 3,
        "checkpoint__every": 1,
        "checkpoint__keep": 3,
    }
    done = run_command("train.py", *overrides(**keys), ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    rows = [row for row in read(run / "metrics.jsonl") if "train/loss" in row]
    gap = max(row["mismatch/logp_abs_mean"] for row in rows)
    # Dropout is on in updates alone.
    assert dropout or gap < (1e-5 if dtype == "float32" else 0.02)
    first, last = (adapter_of(run / "checkpoints" / f"step_{step}") for step in (1, 3))
    assert any(not torch.equal(first[name], last[name]) for name in first)
    # What peft loads does what the merged folder does.
    checkpoint = run / "checkpoints" / "step_3"
    base = plain(tiny_models["student"])
    start = logits(base)
    merged = logits(plain(checkpoint / "model"))
    loaded = logits(PeftModel.from_pretrained(base, checkpoint / "adapter"))
    tolerance = 1e-5 if dtype == "float32" else 0.1
    torch.testing.assert_close(loaded, merged, atol=tolerance, rtol=tolerance)
    assert (merged - start).abs().max() > 1e-2
    # DeepSpeed's state has no frozen weight.
    state = sum(f.stat().st_size for f in (checkpoint / "state").iterdir())
    assert state < (checkpoint / "model" / "model.safetensors").stat().st_size * 2
    again = overrides(**keys, resume=run / "checkpoints" / "step_1")
    done = run_command("train.py", *again, ranks=ranks)
    assert done.returncode == 0, done.stderr[-2000:]
    for name, tensor in adapter_of(checkpoint).items():
        assert torch.equal(tensor, last[name]), name
    if stage == "zero0":
        other = overrides(**keys | {"model__lora__rank": 4}, resume="auto")
        with pytest.raises(CheckpointError, match="lora of rank 3.*this run has lora of rank 4"):
            prepare(compose(other))


def test_streaming_sft_with_new_tokens(tiny_models, overrides, run_command, tmp_path):
    keys = {"recipe": "streaming_sft", "model__lora__rank": 3}
    done = run_command("train.py", *overrides(**keys, train__lr=0.01, checkpoint__every=1))
    assert done.returncode == 0, done.stderr[-2000:]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_2"
    base = plain(tmp_path / "run" / "start")
    loaded = PeftModel.from_pretrained(base, checkpoint / "adapter")
    merged = logits(plain(checkpoint / "model"))
    torch.testing.assert_close(logits(loaded), merged, atol=1e-5, rtol=1e-5)


def test_vllm_answers_with_the_adapter_as_with_the_merged_model(
    tiny_models, overrides, run_command, tmp_path
):
    keys = {"recipe": "sft", "model__lora__rank": 8, "rollout__engine": "hf", "train__lr": 0.02}
    done = run_command("train.py", *overrides(**keys, checkpoint__every=1))
    assert done.returncode == 0, done.stderr[-2000:]
    checkpoint = tmp_path / "run" / "checkpoints" / "step_2"
    done = run_command(
        "-m",
        "tests.trainers.lora_worker",
        *(tiny_models["student"], checkpoint / "adapter", checkpoint / "model"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["adapter"] == answers["merged"] == answers["transformers"]
    assert answers["base"] != answers["merged"]
