"""Writes a Qwen2-Audio model as two folders: its language model, and its speech encoder with the
projector.

    python -m scripts.split_qwen2_audio model=Qwen/Qwen2-Audio-7B-Instruct out=DIR

DIR/text is a Qwen2 model for `model.path`, DIR/speech an encoder:
`model.encoder=rollouts.simultaneous.qwen2_audio.load:DIR/speech`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.cli import print_error


def main(arguments: list[str]) -> int:
    """Returns the exit status; a mistake of the user's ends in one line on stderr."""
    from recipes.errors import ConfigError, OnstreamError
    from scripts.evaluate import key_values

    try:
        given = key_values(
            arguments, {}, "scripts.split_qwen2_audio", "model=DIR out=DIR", ("model", "out")
        )
        if odd := sorted(given.keys() - {"model", "out"}):
            raise ConfigError(f"there is no key '{odd[0]}'; the keys are model and out")
        out = Path(given["out"]).expanduser()
        if out.exists():
            raise ConfigError(f"out={out} exists; give a new folder, or delete it")
        split(given["model"], out)
        print(f"{out}/text  {out}/speech")
        return 0
    except OnstreamError as error:
        print_error(error)
        return 1


def split(model: str, out: Path) -> None:
    """Load it whole and write both parts. Raises ModelError: it is not a Qwen2-Audio model."""
    import torch
    from safetensors.torch import save_file
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        Qwen2AudioForConditionalGeneration,
        Qwen2ForCausalLM,
    )

    from recipes.errors import ModelError
    from rollouts.simultaneous.qwen2_audio import SpeechEncoder

    try:
        config = AutoConfig.from_pretrained(model)
        if config.model_type != "qwen2_audio":
            raise ModelError(
                f"model={model} is a {config.model_type} model; this splits a Qwen2-Audio one"
            )
        tokenizer = AutoTokenizer.from_pretrained(model)
        whole = Qwen2AudioForConditionalGeneration.from_pretrained(model, dtype="auto")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model={model} cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    with torch.device("meta"):  # the weights are there already
        text = Qwen2ForCausalLM(config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict(), assign=True)
    text.lm_head.load_state_dict(whole.lm_head.state_dict(), assign=True)
    text.save_pretrained(out / "text")
    tokenizer.save_pretrained(out / "text")
    encoder = SpeechEncoder(whole.model.audio_tower, whole.model.multi_modal_projector)
    config.save_pretrained(out / "speech")
    save_file(
        {name: value.contiguous() for name, value in encoder.state_dict().items()},
        out / "speech" / "model.safetensors",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
