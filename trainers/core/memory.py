"""Whether a model fits into the memory that it is loaded into. Each rank loads it whole."""

from __future__ import annotations

import os

import psutil
import torch

from recipes.embedded import model_folder
from recipes.errors import ModelError


def check_fits(
    path: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> None:
    """Refuse a model whose weights alone are larger than the memory of the device.

    No ZeRO stage helps here: it shards what a rank has already loaded.

    Args:
        path: a model folder or hub name.
        dtype: that the weights are loaded in.
        device: of this rank. The ranks of one machine share the memory of a CPU.
        trust_remote_code: run the code that comes with the model, if it needs it.

    Raises:
        ModelError: it names both sizes.
    """
    try:
        count = parameter_count(path, trust_remote_code)
    except (OSError, ValueError, ImportError, RuntimeError):
        # Loading it says what is wrong.
        return
    size, room = count * dtype.itemsize, memory_of(device)
    if size > room:
        raise ModelError(
            f"model {path} has {count / 1e9:.1f} billion parameters: {size / 2**30:.0f} GiB in "
            f"{str(dtype).removeprefix('torch.')}, and each rank has {room / 2**30:.0f} GiB; each "
            "loads the model whole, under any ZeRO stage; use bfloat16, fewer ranks on a CPU, or "
            "a smaller model"
        )


def parameter_count(path: str, trust_remote_code: bool) -> int:
    """The number of a model's parameters, by its config. No memory is taken for them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = model_folder(path)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # Nothing is drawn on this device, but an initialisation of its own may draw elsewhere.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def memory_of(device: torch.device) -> int:
    """Bytes that this rank has on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return psutil.virtual_memory().total // ranks
