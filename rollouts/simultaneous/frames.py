"""Sources of frames, as speech is: a frozen causal encoder turns them into embeddings.

The embeddings are read second by second. In token ids a `FRAME` stands for each of them, so a
source of frames has segments, positions and masks as any other.

`model.encoder` names the encoder: the dotted path of a callable that returns a torch module. It is
called without arguments, or with what follows a colon (`module.load:FOLDER`). The module has

    rate            frames per second
    width           D, numbers per frame
    stride          frames per embedding
    longest         frames of the longest source, if there is a limit
    forward         [F, D] float32 -> [ceil(F / stride), H], H being the model's hidden size

Frames come in the prompt column: a list of lists of numbers, or the path of a .npy file beside the
data's (`rollouts.data.frames`).

The encoder has to be causal: an embedding depends on the frames up to the end of its own stride
alone. Else what is read would depend on what is not yet heard. The encoder is not trained here. It
is part of what the model is given, as a tokenizer is."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from recipes.errors import ConfigError, DataError, ModelError, OnstreamError, one_line

FRAME = -1
CPU = torch.device("cpu")
ATTRIBUTES = ("stride", "rate", "width")
# The strides of frames on which an encoder is proved causal.
TRIAL_STRIDES = 5


@functools.cache
def load_encoder(path: str, device: torch.device = CPU) -> torch.nn.Module:
    """The encoder that `model.encoder` names: frozen, in float32, and proved causal.

    The same path and device give the same module each time.

    Raises:
        ConfigError: the path does not import.
        ModelError: the encoder cannot be made, is not causal, or lacks an attribute.
    """
    dotted, _, argument = path.partition(":")
    factory = _import_factory(dotted, path)
    try:
        encoder = factory(argument) if argument else factory()
    except OnstreamError:
        raise
    # The callable is the user's: it may raise errors of any kind.
    except Exception as error:
        reason = one_line(error)
        raise ModelError(f"model.encoder={path} cannot be made: {reason}") from error
    encoder = encoder.float().to(device).eval().requires_grad_(False)
    for attribute in ATTRIBUTES:
        if not hasattr(encoder, attribute):
            raise ModelError(
                f"model.encoder={path} has no attribute '{attribute}' "
                "(rollouts/simultaneous/frames.py)"
            )
    check_causal(encoder, device)
    return encoder


def _import_factory(dotted: str, path: str) -> Callable[..., torch.nn.Module]:
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module or dotted), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"model.encoder={path} cannot be imported: {error}") from error


@torch.no_grad()
@torch.backends.cudnn.flags(enabled=False)
def check_causal(encoder, device: torch.device) -> None:
    """Refuse an encoder that looks ahead.

    cuDNN is off: its convolutions may round to tf32, for one length and not for another.

    Args:
        encoder: as the module says.
        device: that the encoder is on.

    Raises:
        ModelError: an embedding changes with a frame after its own stride, or the number of
            embeddings is not as promised.
    """
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(TRIAL_STRIDES * encoder.stride, encoder.width, generator=generator)
    frames = frames.to(device)
    whole = encoder(frames)
    for count in range(1, TRIAL_STRIDES):
        part = encoder(frames[: count * encoder.stride])
        if len(part) != count or len(whole) != TRIAL_STRIDES:
            raise ModelError(
                f"the encoder makes {len(part)} embeddings of {count} strides of frames; "
                "make one of each"
            )
        tolerance = 1e-4 * float(whole.abs().max())
        if not torch.allclose(part, whole[:count], rtol=1e-3, atol=tolerance):
            raise ModelError("the encoder is not causal: an embedding changes when later frames do")


def frame_units(frames: np.ndarray, encoder, seconds: float, where: str) -> list[tuple[int, ...]]:
    """The units of a source, with a `FRAME` for each embedding.

    Args:
        frames: [F, D].
        encoder: as the module says.
        seconds: the length of a unit. The last one may be shorter.
        where: data and row, for errors.

    Raises:
        DataError: the frames are of another width than the encoder's, or too many for it.
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
    count = _embedding_count(frames, encoder)
    return [(FRAME,) * min(size, count - start) for start in range(0, count, size)]


def embed(model, encoder, ids: torch.Tensor, frames: Sequence[np.ndarray]) -> torch.Tensor:
    """Input embeddings of token ids with frames among them.

    Args:
        model: the Hugging Face model.
        encoder: as the module says.
        ids: [B, n]; in order, its `FRAME`s stand for the embeddings of `frames`.
        frames: arrays [F, D], at least one.

    Returns:
        [B, n, H], in the dtype of the model's embeddings.

    Raises:
        ModelError: the encoder's embeddings are of another number or width than the model needs.
    """
    embeddings = model.get_input_embeddings()(ids.clamp(min=0))
    width = embeddings.shape[-1]
    heard = [_encode(encoder, source, width, ids.device) for source in frames]
    is_frame = (ids == FRAME)[..., None]
    return embeddings.masked_scatter(is_frame, torch.cat(heard).to(embeddings.dtype))


def _encode(encoder, frames: np.ndarray, width: int, device: torch.device) -> torch.Tensor:
    """[embeddings, width] of one source [F, D]."""
    output = encoder(torch.as_tensor(frames, dtype=torch.float32, device=device))
    shape = (_embedding_count(frames, encoder), width)
    if output.shape != shape:
        raise ModelError(
            f"the encoder makes {tuple(output.shape)} of {len(frames)} frames; "
            f"the model needs {shape}"
        )
    return output


def _embedding_count(frames: np.ndarray, encoder) -> int:
    return math.ceil(len(frames) / encoder.stride)
