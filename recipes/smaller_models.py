"""Models without some of their layers: `model.path=smollm2-135m-27` names one of them.

The first use takes the layers out of the whole model, and writes a folder into the cache, where
that model lies too (recipes/packaged_models.py). `python -m scripts.remove_layers` does the same to
any model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import ConfigError, ModelError, one_line
from recipes.locks import turn
from recipes.packaged_models import cache_folder, packaged_folder

# Lists of a config with an entry per layer.
PER_LAYER = ("layer_types", "no_rope_layers")
# Settings that say by a layer's index what it is made of, where they are set.
BY_INDEX = ("mlp_only_layers", "first_k_dense_replace", "moe_layer_start_index")


@dataclass(frozen=True)
class SmallerModel:
    """A packaged model and the layers, from 0, that are taken out of it."""

    whole: str
    removed: tuple[int, ...]


# The layers that cost least: a search by KL is in docs/models.md.
MODELS = {"smollm2-135m-27": SmallerModel("smollm2-135m", (4, 5, 25))}


def smaller_folder(name: str) -> Path:
    """The folder of a smaller model, which is made now where it is missing.

    Args:
        name: a key of `MODELS`.

    Raises:
        ModelError: the whole model cannot be fetched, or the smaller one cannot be kept.
    """
    model = MODELS[name]
    whole = packaged_folder(model.whole)
    removed = "-".join(map(str, model.removed))
    folder = cache_folder() / f"{whole.name}-without-{removed}"
    if folder.is_dir():
        return folder
    try:
        with turn(folder.with_name(f".{folder.name}.lock"), f"another process that makes {name}"):
            if not folder.is_dir():
                _write(whole, model.removed, folder)
    except OSError as error:
        raise ModelError(
            f"model {name} cannot be kept in {folder.parent}: {one_line(error)}; set "
            "ONSTREAM_CACHE to a folder with more room"
        ) from error
    return folder


def _write(whole: Path, removed: Collection[int], folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole, dtype="auto")
    remove_layers(model, removed)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as work:
        model.save_pretrained(Path(work) / "model")
        AutoTokenizer.from_pretrained(whole).save_pretrained(Path(work) / "model")
        (Path(work) / "model").rename(folder)


def remove_layers(model, layers: Collection[int]) -> None:
    """Remove layers of a decoder, in place; its config then describes what is left.

    Args:
        model: a `*ForCausalLM` whose base model has a list `layers`.
        layers: indices, from 0.

    Raises:
        ConfigError: there is no such layer, or none would be left.
        ModelError: the model keeps its layers elsewhere, or its config says by their indices what
            they are.
    """
    from torch import nn

    config, decoder = model.config, model.base_model
    depth = config.num_hidden_layers
    if len(getattr(decoder, "layers", ())) != depth:
        raise ModelError(f"{type(model).__name__} has no list of {depth} layers to remove from")
    for name in BY_INDEX:
        if getattr(config, name, None):
            raise ModelError(
                f"{type(model).__name__}: its config says by a layer's index what it is ({name}), "
                "which would mean other layers afterwards; take a model without that"
            )
    if getattr(config, "decoder_sparse_step", 1) != 1:
        raise ModelError(
            f"{type(model).__name__}: only some of its layers have experts (decoder_sparse_step), "
            "by their indices; take a model without that"
        )
    missing = sorted(set(layers) - set(range(depth)))
    if missing:
        raise ConfigError(f"layers: the model has no layer {missing[0]}; its are 0 to {depth - 1}")
    kept = [index for index in range(depth) if index not in layers]
    if not kept:
        raise ConfigError(f"layers: all {depth} layers would be removed; leave one at least")
    decoder.layers = nn.ModuleList(decoder.layers[index] for index in kept)
    # A layer's index is its place in the cache of keys and values.
    for index, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    config.num_hidden_layers = len(kept)
    for name in PER_LAYER:
        values = getattr(config, name, None)
        if values:
            setattr(config, name, [values[index] for index in kept])
