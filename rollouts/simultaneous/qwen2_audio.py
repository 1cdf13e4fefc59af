"""Qwen2-Audio's speech encoder made causal, as an encoder of frames (rollouts/simultaneous/frames.py).

    python -m scripts.split_qwen2_audio model=Qwen/Qwen2-Audio-7B-Instruct out=DIR
    python train.py recipe=proactivellm_speech model.path=DIR/text \
        model.encoder=rollouts.simultaneous.qwen2_audio.load:DIR/speech data.path=FILE

Frames are log-mel, 100 per second, as transformers' WhisperFeatureExtractor makes them (it scales
them by the loudest of the whole recording: for a strictly causal input scale them by a constant).
Two frames of zeros before them let the convolutions, which look a frame ahead each, see only what
has been heard, and a mask does the same for attention; all else is as in the original. It was not
trained so: the paper's causal Whisper is, and is loaded the same way. """

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import gelu, pad

from recipes.errors import ModelError


class SpeechEncoder(nn.Module):
    """Four frames per embedding, 25 embeddings per second; sources of up to 30 s.

    Args:
        tower: transformers' Qwen2AudioEncoder.
        projector: from its embeddings to the language model's.
    """

    rate, stride = 100.0, 4

    def __init__(self, tower: nn.Module, projector: nn.Module):
        super().__init__()
        self.tower, self.projector = tower, projector
        self.width, self.longest = tower.num_mel_bins, 2 * tower.max_source_positions

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """[F, D] -> [ceil(F / 4), H]."""
        tower, count = self.tower, math.ceil(len(frames) / self.stride)
        mel = pad(
            frames.T[None].to(tower.conv1.weight.dtype), (2, self.stride * count - len(frames))
        )
        hidden = gelu(tower.conv2(gelu(tower.conv1(mel))))[..., : 2 * count].transpose(1, 2)
        hidden = hidden + tower.embed_positions.weight[: 2 * count]
        mask = hidden.new_full((2 * count, 2 * count), torch.finfo(hidden.dtype).min).triu(1)[
            None, None
        ]
        for layer in tower.layers:
            hidden = layer(hidden, mask)
        pooled = tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2)
        return self.projector(tower.layer_norm(pooled))[0]


def load(folder: str) -> SpeechEncoder:
    """The encoder that scripts/split_qwen2_audio.py wrote. Raises ModelError: it is not there."""
    from safetensors.torch import load_file
    from transformers import Qwen2AudioConfig

    place = Path(folder).expanduser()
    if not (place / "model.safetensors").is_file():
        raise ModelError(
            f"{place} holds no speech encoder; write one with python -m scripts.split_qwen2_audio"
        )
    encoder = build(Qwen2AudioConfig.from_pretrained(place))
    encoder.load_state_dict(load_file(place / "model.safetensors"))
    return encoder


def build(config) -> SpeechEncoder:
    """One with random weights, for a Qwen2AudioConfig."""
    from transformers.models.qwen2_audio.modeling_qwen2_audio import (
        Qwen2AudioEncoder,
        Qwen2AudioMultiModalProjector,
    )

    return SpeechEncoder(
        Qwen2AudioEncoder(config.audio_config), Qwen2AudioMultiModalProjector(config)
    ).eval()
