"""Writes a Qwen2-Audio model as two folders: its language model, and its speech encoder.

    python -m scripts.split_qwen2_audio model=Qwen/Qwen2-Audio-7B-Instruct out=DIR

DIR/text is a Qwen2 model for `model.path`. DIR/speech is the speech encoder with the projector:
`model.encoder=rollouts.simultaneous.qwen2_audio.load:DIR/speech`.
"""

from __future__ import annotations

from pathlib import Path

from recipes.errors import ConfigError, ModelError, one_line
from scripts.cli import key_values, launch, run_command

OWN_KEYS = {
    "model": "Qwen2-Audio model: a folder, or a name on the Hugging Face hub.",
    "out": "New folder, in which the two folders are written.",
}


def main(arguments: list[str]) -> int:
    """Split the model that the arguments name; returns the exit status."""
    return run_command(split_command, arguments, __doc__, OWN_KEYS)


def split_command(arguments: list[str]) -> None:
    values = key_values(
        arguments,
        {},
        module="scripts.split_qwen2_audio",
        usage="model=DIR out=DIR",
        required=tuple(OWN_KEYS),
    )
    if unknown := sorted(values.keys() - OWN_KEYS.keys()):
        raise ConfigError(f"there is no key '{unknown[0]}'; the keys are model and out")
    out = Path(values["out"]).expanduser()
    if out.exists():
        raise ConfigError(f"out={out} exists; give a new folder, or delete it")
    split(values["model"], out)
    print(f"{out}/text  {out}/speech")


def split(model: str, out: Path) -> None:
    """Load a Qwen2-Audio model and write both parts.

    Raises:
        ModelError: it is not a Qwen2-Audio model, or cannot be loaded.
    """
    config, tokenizer, whole = load_whole(model)
    write_text(config, whole, out / "text")
    tokenizer.save_pretrained(out / "text")
    write_speech(config, whole, out / "speech")


def load_whole(model: str):
    """The config, the tokenizer and the model of a Qwen2-Audio folder or hub name."""
    from transformers import AutoConfig, AutoTokenizer, Qwen2AudioForConditionalGeneration

    try:
        config = AutoConfig.from_pretrained(model)
        if config.model_type != "qwen2_audio":
            raise ModelError(
                f"model={model} is a {config.model_type} model; this splits a Qwen2-Audio one"
            )
        tokenizer = AutoTokenizer.from_pretrained(model)
        whole = Qwen2AudioForConditionalGeneration.from_pretrained(model, dtype="auto")
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise ModelError(f"model={model} cannot be loaded: {reason}") from error
    return config, tokenizer, whole


def write_text(config, whole, folder: Path) -> None:
    """Write the language model as a Qwen2 model."""
    import torch
    from transformers import Qwen2ForCausalLM

    # The weights are there already, so the new model needs no memory of its own.
    with torch.device("meta"):
        text = Qwen2ForCausalLM(config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict(), assign=True)
    text.lm_head.load_state_dict(whole.lm_head.state_dict(), assign=True)
    text.save_pretrained(folder)


def write_speech(config, whole, folder: Path) -> None:
    """Write the speech encoder with the projector, for rollouts/simultaneous/qwen2_audio.py."""
    from safetensors.torch import save_file

    from rollouts.simultaneous.qwen2_audio import SpeechEncoder

    encoder = SpeechEncoder(whole.model.audio_tower, whole.model.multi_modal_projector)
    weights = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors")


if __name__ == "__main__":
    launch(main)
