"""Removes layers of a model: the folder of a smaller model that starts from the rest.

    python -m scripts.remove_layers model=DIR layers=10,20,28 out=NEW_DIR

`model` is anything that `model.path` takes. Layers count from 0, the one above the embedding. The
others keep their weights and their order. What a model does less well without them can be learned
again from the whole model, as its teacher: `model.path=NEW_DIR teacher.path=DIR`.
"""

from __future__ import annotations

from pathlib import Path

from recipes.errors import ConfigError
from recipes.registry import nearest
from scripts.cli import key_values, launch, run_command

OWN_KEYS = {
    "model": "Model to start from, named as model.path is.",
    "layers": "Layers to remove, as in 10,20,28; the first one is 0.",
    "out": "New folder for the smaller model.",
}
TRUST = "model.trust_remote_code"
KEYS = OWN_KEYS | {TRUST: "true: run the Python code that comes with the model, if it needs it."}


def main(arguments: list[str]) -> int:
    """Write the model without the layers that the arguments name; returns the exit status."""
    return run_command(print_smaller_model, arguments, __doc__, KEYS)


def print_smaller_model(arguments: list[str]) -> None:
    values = key_values(
        arguments,
        {},
        module="scripts.remove_layers",
        usage="model=DIR layers=10,20,28 out=NEW_DIR",
        required=tuple(OWN_KEYS),
    )
    for key in values:
        if key not in KEYS:
            raise ConfigError(f"there is no key '{key}'{nearest(key, KEYS)}")
    trusted = values.get(TRUST, "false")
    if trusted not in ("true", "false"):
        raise ConfigError(f"{TRUST}={trusted} must be true or false")
    folder = Path(values["out"]).expanduser()
    if folder.exists():
        raise ConfigError(f"out={folder} exists; give a new folder, or delete it")
    layers = layer_indices(values["layers"])
    print(write_smaller_model(values["model"], layers, folder, trusted == "true"))


def layer_indices(text: str) -> list[int]:
    """The layers of `layers=10,20,28`.

    Raises:
        ConfigError: it has another form, or names a layer twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"layers={text} must be whole numbers with commas, as in layers=10,20,28")
    layers = [int(part) for part in parts]
    if len(set(layers)) < len(layers):
        raise ConfigError(f"layers={text} names a layer twice")
    return layers


def write_smaller_model(
    path: str, layers: list[int], folder: Path, trust_remote_code: bool = False
) -> str:
    """Write a model without some of its layers; returns a line about it.

    Args:
        path: a model, as `model.path` takes it.
        layers: indices, from 0.
        folder: a new folder.
        trust_remote_code: run the code that comes with the model, if it needs it.

    Raises:
        ConfigError: there is no such layer, or the folder cannot be written.
        ModelError: the model cannot be loaded, or has no list of layers.
    """
    from scripts.cli import quiet_torch

    quiet_torch()
    from recipes.smaller_models import remove_layers
    from rollouts.pretrained import drop_unused_sampling, load_model
    from trainers.core.policy import check_model

    tokenizer, _ = check_model("model", path, trust_remote_code)
    model = load_model(path, trust_remote_code, dtype="auto")
    drop_unused_sampling(model)
    parameters, depth = model.num_parameters(), model.config.num_hidden_layers
    remove_layers(model, layers)
    work = folder.with_name(f"{folder.name}.part")
    try:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        work.rename(folder)
    except OSError as error:
        raise ConfigError(f"out={folder} cannot be written: {error}") from error
    return (
        f"{folder}: {model.config.num_hidden_layers} of {depth} layers, "
        f"{model.num_parameters() / 1e6:.1f}M of {parameters / 1e6:.1f}M parameters"
    )


if __name__ == "__main__":
    launch(main)
