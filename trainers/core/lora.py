"""LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353) adapters, by peft, inside the policy's model.

The model's own weights are frozen. The adapters are injected into its layers, so that the policy,
DeepSpeed and the losses see a model of the same class. The rollout engine and the exported model
get the merged weights. Without its adapters the policy is the model that the run started from.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from recipes.errors import ConfigError, first_line

# peft's name of the only adapter.
ADAPTER = "default"
# What peft puts between a layer's name and that of its own weight.
BASE = ".base_layer"
# The targets that stand for all linear layers but the head.
ALL_LINEAR = ["all-linear"]
# What peft and vLLM expect before the names of an adapter's tensors.
PREFIX = "base_model.model."


def add_adapters(model: nn.Module, options, train_embeddings: bool = False) -> None:
    """Freeze a model's weights, and give its layers adapters that change nothing yet.

    Args:
        model: a Hugging Face decoder, on its device.
        options: the section `model.lora` of a config.
        train_embeddings: the embeddings and an untied head stay trainable, since the model has new
            tokens.

    Raises:
        ConfigError: `model.lora.targets` has a name of no layer, or of one that cannot have an
            adapter.
    """
    from peft import inject_adapter_in_model

    try:
        with warnings.catch_warnings():
            # peft says so of GPT-2's layers, whose weights are transposed, and then does it.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False .* to True")
            inject_adapter_in_model(_peft_config(options), model, ADAPTER)
    except ValueError as error:
        raise ConfigError(f"{_targets(options)}: {first_line(error)}") from error
    _check_layers(model, options)
    if train_embeddings:
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.requires_grad_(True)


def _check_layers(model: nn.Module, options) -> None:
    """Raises ConfigError: a layer cannot have its adapter, or a target has no layer."""
    from peft.tuners.lora.layer import ParamWrapper

    layers = adapted_layers(model)
    for name, module in layers.items():
        if isinstance(module, ParamWrapper):
            raise ConfigError(
                f"{_targets(options)}: {name} is a router or a set of experts, which can have no "
                "adapter; name linear layers, as model.lora.targets=[q_proj,k_proj,v_proj,o_proj]"
            )
        if not isinstance(module, nn.Module) or not hasattr(module, "lora_A") or not module.lora_A:
            raise ConfigError(
                f"{_targets(options)}: {name} is no linear layer; name linear layers only"
            )
        if module is model.get_output_embeddings():
            raise ConfigError(
                f"{_targets(options)}: {name} is the head, which the losses read as a matrix; name "
                "other layers"
            )
    for target in options.targets if list(options.targets) != ALL_LINEAR else ():
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ConfigError(f"{_targets(options)}: no layer's name ends in {target}")


def _targets(options) -> str:
    return f"model.lora.targets=[{','.join(options.targets)}]"


def _peft_config(options):
    from peft import LoraConfig

    targets = list(options.targets)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules="all-linear" if targets == ALL_LINEAR else targets,
        use_dora=options.dora,
    )


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have an adapter, by name; empty without LoRA."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def adapter_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """What the merged weight of a layer is computed of, besides its own weight."""
    return [parameter for name, parameter in layer.named_parameters() if is_adapter(f".{name}")]


@torch.no_grad()
def merged_weight(layer: nn.Module) -> torch.Tensor:
    """The weight [out, in] with which the layer alone does what it does with its adapter."""
    weight = layer.get_base_layer().weight.detach()
    if ADAPTER in layer.lora_variant:
        return layer.lora_variant[ADAPTER].merge_safe(layer, ADAPTER, weight.clone())
    return weight + layer.get_delta_weight(ADAPTER).to(weight.dtype)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let the model compute what it did before it had adapters."""
    layers = list(adapted_layers(model).values())

    def disable(value: bool) -> None:
        # peft's own switch also changes requires_grad, which DeepSpeed has read.
        for layer in layers:
            layer._disable_adapters = value

    disable(True)
    try:
        yield
    finally:
        disable(False)


def save_adapters(
    folder: Path, model: nn.Module, state: Mapping[str, torch.Tensor], base: str
) -> None:
    """Write a folder that peft and vLLM load as an adapter.

    Args:
        folder: a new one.
        model: with adapters.
        state: the trainable parameters by name, whole.
        base: the folder or hub name of the model without adapters.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config.inference_mode = False
    tensors = {
        PREFIX + name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}"): tensor.contiguous()
        for name, tensor in state.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
