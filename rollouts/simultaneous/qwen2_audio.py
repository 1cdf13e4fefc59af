"""Qwen2-Audio's speech encoder made causal, as an encoder of frames.

    python -m scripts.split_qwen2_audio model=Qwen/Qwen2-Audio-7B-Instruct out=DIR
    python train.py recipe=proactivellm_speech model.path=DIR/text \
        model.encoder=rollouts.simultaneous.qwen2_audio.load:DIR/speech data.path=FILE

rollouts/simultaneous/frames.py says what an encoder is. Frames are log-mel, 100 per second, as
transformers' WhisperFeatureExtractor makes them. The extractor scales frames by the loudest of the
whole recording; for a strictly causal input scale them by a constant.

Two frames of zeros come first. So the convolutions, which look a frame ahead each, see only what
has been heard. A mask does the same for attention. Everything else is as in the original, which was
not trained this way. The paper's causal Whisper was, and is loaded the same way.
"""

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
        """Embeddings [ceil(F / 4), H] of frames [F, D]."""
        tower = self.tower
        count = math.ceil(len(frames) / self.stride)
        # The pooler halves the rate of the convolutions, so there are two places per embedding.
        places = 2 * count
        mel = frames.T[None].to(tower.conv1.weight.dtype)
        mel = pad(mel, (2, self.stride * count - len(frames)))
        hidden = gelu(tower.conv1(mel))
        hidden = gelu(tower.conv2(hidden))[..., :places]
        hidden = hidden.transpose(1, 2) + tower.embed_positions.weight[:places]
        lowest = torch.finfo(hidden.dtype).min
        mask = hidden.new_full((places, places), lowest).triu(1)
        for layer in tower.layers:
            hidden = layer(hidden, mask[None, None])
        pooled = tower.avg_pooler(hidden.transpose(1, 2))
        hidden = tower.layer_norm(pooled.transpose(1, 2))
        return self.projector(hidden)[0]


def load(folder: str) -> SpeechEncoder:
    """The encoder that scripts/split_qwen2_audio.py wrote.

    Raises:
        ModelError: it is not there.
    """
    from safetensors.torch import load_file
    from transformers import Qwen2AudioConfig

    path = Path(folder).expanduser()
    weights = path / "model.safetensors"
    if not weights.is_file():
        raise ModelError(
            f"{path} holds no speech encoder; write one with python -m scripts.split_qwen2_audio"
        )
    encoder = build(Qwen2AudioConfig.from_pretrained(path))
    encoder.load_state_dict(load_file(weights))
    return encoder


def build(config) -> SpeechEncoder:
    """An encoder with random weights, for a Qwen2AudioConfig."""
    from transformers.models.qwen2_audio.modeling_qwen2_audio import (
        Qwen2AudioEncoder,
        Qwen2AudioMultiModalProjector,
    )

    tower = Qwen2AudioEncoder(config.audio_config)
    return SpeechEncoder(tower, Qwen2AudioMultiModalProjector(config)).eval()
