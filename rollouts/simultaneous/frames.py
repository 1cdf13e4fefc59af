"""Sources of frames, as speech is: a frozen causal encoder turns them into embeddings, which are
read second by second.

In token ids a `FRAME` stands for each embedding, so a source of frames has segments, positions and
masks as any other. `model.encoder` names the encoder: the dotted path of a callable that returns a
torch module, called without arguments, or with what follows a colon (`module.load:FOLDER`). The
module has

    rate            frames per second
    width           D, numbers per frame
    stride          frames per embedding
    longest         frames of the longest source, if there is a limit
    forward         [F, D] float32 -> [ceil(F / stride), H], H being the model's hidden size

Frames come in the prompt column: a list of lists of numbers, or the path of a .npy file beside the
    data's.

The encoder has to be causal: an embedding depends on the frames up to its own stride alone, else
what is read would depend on what is not yet heard. It is not trained here; it is part of what the
model is given, as a tokenizer is."""

from __future__ import annotations

import functools
import importlib
import math

import numpy as np
import torch

from recipes.errors import ConfigError, DataError, ModelError, OnstreamError

FRAME = -1


@functools.cache
def load_encoder(path: str, device: torch.device = torch.device("cpu")):
    """`model.encoder`, frozen, in float32 and proved causal; the same one each time.

    Raises:
        ConfigError: the path does not import.
        ModelError: it is not causal, or lacks an attribute.
    """
    dotted, _, argument = path.partition(":")
    module, _, name = dotted.rpartition(".")
    try:
        made = getattr(importlib.import_module(module or dotted), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"model.encoder={path} cannot be imported: {error}") from error
    try:
        encoder = made(argument) if argument else made()
    except OnstreamError:
        raise
    except Exception as error:  # it is the user's
        raise ModelError(
            f"model.encoder={path} cannot be made: {' '.join(str(error).split())}"
        ) from error
    encoder = encoder.float().to(device).eval().requires_grad_(False)
    for attribute in ("stride", "rate", "width"):
        if not hasattr(encoder, attribute):
            raise ModelError(
                f"model.encoder={path} has no attribute '{attribute}' (rollouts/simultaneous/frames.py)"
            )
    check_causal(encoder, device)
    return encoder


@torch.no_grad()
def check_causal(encoder, device: torch.device) -> None:
    """Raises ModelError: an embedding changes with a frame after its own stride, or their number is
    not as promised."""
    frames = torch.randn(
        5 * encoder.stride, encoder.width, generator=torch.Generator().manual_seed(0)
    ).to(device)
    whole = encoder(frames)
    for count in range(1, 5):
        part = encoder(frames[: count * encoder.stride])
        if len(part) != count or len(whole) != 5:
            raise ModelError(
                f"the encoder makes {len(part)} embeddings of {count} strides of frames; make one of each"
            )
        if not torch.allclose(part, whole[:count], rtol=1e-3, atol=1e-4 * float(whole.abs().max())):
            raise ModelError("the encoder is not causal: an embedding changes when later frames do")


def frame_units(frames: np.ndarray, encoder, seconds: float, where: str) -> list[tuple[int, ...]]:
    """A `FRAME` per embedding, in units of `seconds` (the last one may be shorter).

    Raises:
        DataError: they are of another width than the encoder's, or too many for it.
    """
    longest = getattr(encoder, "longest", len(frames))
    if len(frames) > longest:
        raise DataError(
            f"{where} lasts {len(frames) / encoder.rate:g} s; model.encoder hears at most "
            f"{longest / encoder.rate:g} s; cut it"
        )
    if frames.shape[1] != encoder.width:
        raise DataError(
            f"{where} has frames of {frames.shape[1]} numbers; model.encoder reads {encoder.width}"
        )
    size = max(round(seconds * encoder.rate / encoder.stride), 1)
    count = math.ceil(len(frames) / encoder.stride)
    return [(FRAME,) * min(size, count - start) for start in range(0, count, size)]


def embed(model, encoder, ids: torch.Tensor, frames: list[np.ndarray]) -> torch.Tensor:
    """Input embeddings of token ids with frames among them.

    Args:
        model: the Hugging Face model.
        ids: [B, n]; in order, its `FRAME`s are the embeddings of `frames`.
        frames: arrays [F, D].

    Returns:
        [B, n, H].
    """
    embeddings = model.get_input_embeddings()(ids.clamp(min=0))
    heard = [
        encoder(torch.as_tensor(array, dtype=torch.float32, device=ids.device)) for array in frames
    ]
    for array, made in zip(frames, heard):
        if made.shape != (wanted := (math.ceil(len(array) / encoder.stride), embeddings.shape[-1])):
            raise ModelError(
                f"the encoder makes {tuple(made.shape)} of {len(array)} frames; the model needs {wanted}"
            )
    heard = torch.cat(heard)
    return embeddings.masked_scatter((ids == FRAME)[..., None], heard.to(embeddings.dtype))
