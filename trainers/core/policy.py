"""A causal language model as the losses see it: a backbone that gives hidden states, and a head
that owns its weight."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from recipes.embedded import model_folder, names
from recipes.errors import ModelError
from recipes.registry import nearest
from rollouts.layout import Layout, check_layouts
from rollouts.pretrained import drop_unused_sampling
from trainers.core import attention

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class LMHead(nn.Module):
    """The LM head as a module of its own: it owns the (possibly tied) weight, so that ZeRO-3
    gathers it for `forward`, and runs a loss on [T, H] hidden states without ever making the [T, V]
    logits."""

    def __init__(self, lm_head: nn.Linear, softcap: float | None):
        super().__init__()
        self.weight = lm_head.weight
        self.bias = lm_head.bias
        self.softcap = softcap

    def forward(self, hidden: torch.Tensor, function, *arguments):
        """`function(self, hidden [T, H], *arguments)`."""
        return function(self, hidden, *arguments)


class Policy(nn.Module):
    """A Hugging Face decoder split at its head.

    Args:
        model: any `*ForCausalLM` whose logits are `lm_head(hidden)`, with an optional bias and
            soft-cap.
        embed: makes input embeddings [B, n, H] of (model, ids [B, n], frames), for sources that
            are no text. What it uses is not trained, so it is no part of the module.

    Raises:
        ModelError: its logits are something else, so our head would be wrong, or its attention does
            not keep packed sequences apart (both checked on a few tokens).
    """

    def __init__(self, model: nn.Module, embed: Callable | None = None):
        super().__init__()
        self.model = model
        self.embed = embed
        self.head = LMHead(
            model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
        )
        self._check()

    @torch.no_grad()
    def _check(self) -> None:
        ids = torch.arange(4, device=self.head.weight.device)[None]
        training = self.training
        self.eval()
        theirs = self.model(input_ids=ids, use_cache=False).logits
        alone = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        ours = nn.functional.linear(alone, self.head.weight, self.head.bias)
        if self.head.softcap:
            ours = self.head.softcap * torch.tanh(ours / self.head.softcap)
        packed = self._states(torch.cat([ids, ids], 1), torch.cat([ids, ids], 1), [0, 4, 8])
        self.train(training)
        name, close = (
            type(self.model).__name__,
            {"rtol": 1e-2, "atol": 1e-2 * float(alone.abs().max())},
        )
        if not torch.allclose(
            ours.float(), theirs.float(), rtol=1e-2, atol=1e-2 * float(theirs.abs().max())
        ):
            raise ModelError(
                f"{name} does more than a linear head after its last hidden state; not supported"
            )
        if not torch.allclose(packed[4:].float(), alone[0].float(), **close):
            raise ModelError(
                f"{name} lets packed sequences see one another with model.attn_implementation="
                f"{self.model.config._attn_implementation}; try another one"
            )

    def check_layouts(self) -> None:
        """Raises ModelError: it does not keep to the mask of a streaming layout."""

        def states(ids, layout):
            row, positions = (
                torch.tensor([values], device=self.head.weight.device)
                for values in (ids, layout.positions().tolist())
            )
            return self._states(row, positions, [0, len(ids)], [layout])

        training = self.training
        self.eval()
        check_layouts(self.model, states)
        self.train(training)

    def _states(
        self,
        input_ids,
        position_ids,
        bounds: list[int],
        layouts: list[Layout] | None = None,
        frames=None,
    ) -> torch.Tensor:
        extra = attention.arguments(
            self.model.config._attn_implementation, bounds, layouts, self.head.weight
        )
        inputs = (
            {"input_ids": input_ids}
            if frames is None
            else {"inputs_embeds": self.embed(self.model, input_ids, frames)}
        )
        return self.model.base_model(
            **inputs, position_ids=position_ids, use_cache=False, **extra
        ).last_hidden_state[0]

    def hidden(self, batch) -> torch.Tensor:
        """Hidden states [T, H] that predict the micro-batch's targets."""
        states = self._states(
            batch.input_ids, batch.position_ids, batch.bounds, batch.layouts, batch.frames
        )
        return states.index_select(0, batch.rows)

    def forward(self, batch, function):
        """Run `function(head, hidden [T, H], batch)` on a micro-batch."""
        return self.head(self.hidden(batch), function, batch)


def load_policy(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str = "packed",
    masked: bool = False,
    embed: Callable | None = None,
) -> Policy:
    """Load a model folder or hub name.

    Args:
        path: the folder or name.
        dtype: of the weights.
        device: where they go.
        attn_implementation: `model.attn_implementation`.
        masked: sequences will come with masks and positions of their own.
        embed: makes input embeddings of sources that are no text.

    Raises:
        ModelError: it cannot be loaded, or does not keep to such masks.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    path = model_folder(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"model {path} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    drop_unused_sampling(model)
    policy = Policy(model.to(device), embed)
    if masked:
        policy.check_layouts()
    return policy


def check_model(key: str, path: str):
    """The tokenizer and config of a model, before any weight is read.

    Returns:
        (tokenizer, config), the tokenizer with `stop_ids`: its end token and those of the model's
        two configs.

    Raises:
        ModelError: no such folder or hub model; the message names `key`.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = model_folder(path)
    local = Path(folder)
    if not local.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        hint = "" if "/" in path else nearest(path, names())
        raise ModelError(f"{key}={path}: no such folder{hint}")
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        where = (
            "is not a model folder"
            if local.is_dir()
            else "is neither a folder nor a model the hub gave"
        )
        raise ModelError(f"{key}={path} {where}: {str(error).strip().splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{key}={path}: its tokenizer has no end token (eos_token)")
    ends = [tokenizer.eos_token_id]
    configs = [config]
    with contextlib.suppress(OSError):
        configs.append(GenerationConfig.from_pretrained(folder))
    for listed in (getattr(one, "eos_token_id", None) for one in configs):
        ends += listed if isinstance(listed, list) else [listed] if listed is not None else []
    tokenizer.stop_ids = tuple(dict.fromkeys(ends))
    return tokenizer, config


def check_same_vocabulary(student, teacher, student_path: str, teacher_path: str) -> None:
    """Refuse a teacher that reads token ids differently from the student.

    Raises:
        ModelError: naming the first token that differs.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    odd = sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: (item[1], item[0]))[0]
    raise ModelError(
        f"teacher.path={teacher_path} has another vocabulary than model.path={student_path}: token "
        f"{odd[0]!r} (id {odd[1]}) is only in one of them; distillation needs one tokenizer"
    )
