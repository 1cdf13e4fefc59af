"""A causal language model as the losses see it: a backbone of hidden states, and a head."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from recipes.embedded import known_names, model_folder
from recipes.errors import ModelError, first_line
from recipes.registry import nearest
from rollouts.layout import Layout, check_layouts
from rollouts.pretrained import (
    caps_attention,
    drop_unused_sampling,
    load_model,
    needs_own_code,
)
from trainers.core import attention
from trainers.core.memory import check_fits

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


# In a config's `auto_map`: the class that comes with the model.
AUTO_CLASS = "AutoModelForCausalLM"
# A logit so low that its probability is exactly 0. It is finite, so that 0 times it is 0.
NEVER = -1e4


class LMHead(nn.Module):
    """The LM head as a module of its own.

    It owns the weight [V, H], which may be tied, so that ZeRO-3 gathers it for `forward`. It runs a
    loss on [T, H] hidden states, and never makes the [T, V] logits.
    """

    def __init__(self, lm_head: nn.Linear, softcap: float | None):
        super().__init__()
        self.weight = lm_head.weight
        self.own_bias = lm_head.bias
        self.softcap = softcap
        # [V], added to the logits: `NEVER` for ids that are no tokens. None: all are.
        self.register_buffer("never", None, persistent=False)

    @property
    def bias(self) -> torch.Tensor | None:
        """[V]: what is added to the logits, or None."""
        if self.never is None or self.own_bias is None:
            return self.own_bias if self.never is None else self.never
        return self.own_bias + self.never

    def tensors(self) -> list[torch.Tensor]:
        """What it computes with: weight, bias and the ids that it leaves out, where it has them."""
        return [t for t in (self.weight, self.own_bias, self.never) if t is not None]

    def leave_out(self, ids: Sequence[int]) -> None:
        """Give these ids a probability of 0.

        Raises:
            ModelError: the head has a soft-cap, which would lift them again.
        """
        if not ids:
            return
        if self.softcap is not None:
            raise ModelError(
                f"the tokenizer has no token for {len(ids)} ids below its largest (first: {ids[0]}"
                "), and the model caps its logits; give these ids tokens"
            )
        never = torch.zeros(len(self.weight), dtype=self.weight.dtype, device=self.weight.device)
        never[list(ids)] = NEVER
        self.never = never

    def forward(self, hidden: torch.Tensor, function, *arguments):
        """`function(self, hidden [T, H], *arguments)`."""
        return function(self, hidden, *arguments)


class Policy(nn.Module):
    """A Hugging Face decoder split at its head.

    Args:
        model: any `*ForCausalLM` whose logits are `lm_head(hidden)`, with an optional bias,
            soft-cap and scale.
        embed: makes input embeddings [B, n, H] of (model, ids [B, n], frames), for sources that
            are no text. What it uses is not trained, so it is no part of the module.

    Raises:
        ModelError: the logits are something else, so our head would be wrong. Or the attention does
            not keep packed sequences apart. A few tokens show both.
    """

    def __init__(self, model: nn.Module, embed: Callable | None = None):
        super().__init__()
        self.model = model
        self.embed = embed
        self.logit_scale = logit_scale(model.config)
        self.head = LMHead(
            model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
        )
        self._check()

    @torch.no_grad()
    def _check(self) -> None:
        device = self.head.weight.device
        first, second = torch.arange(16, device=device).view(2, 1, 8)
        places = torch.arange(8, device=device)[None]
        training = self.training
        self.eval()
        implementation = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        logits = self.model(input_ids=second, use_cache=False).logits
        hidden = self.model.base_model(input_ids=second, use_cache=False).last_hidden_state
        self.model.set_attn_implementation(implementation)
        row = torch.cat([first, second], 1), torch.cat([places, places], 1)
        name = type(self.model).__name__
        exact = hidden.dtype in (torch.float32, torch.float64)
        if not _close(self._logits(hidden), logits, 1e-4 if exact else 2e-2):
            raise ModelError(
                f"{name} does more than a linear head after its last hidden state; not supported"
            )
        for cast in attention.casts(implementation, hidden):
            with torch.autocast(device.type, torch.bfloat16, enabled=cast):
                packed = self._states(*row, [0, 8, 16])
            # The rounding of 16 bits adds up over the layers: 0.05 in a model of 30. Seeing another
            # sequence makes 1.3 there.
            if not _close(packed[8:], hidden[0], 1e-3 if exact and not cast else 0.3):
                raise ModelError(
                    f"{name} computes something else in packed sequences with "
                    f"model.attn_implementation={implementation} than in single ones with eager; "
                    "try another one"
                )
        self.train(training)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the kernels make of the head, as a whole: logits [..., V] of hidden states."""
        head = self.head
        logits = nn.functional.linear(hidden * self.logit_scale, head.weight, head.bias)
        return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits

    def check_layouts(self) -> None:
        """Refuse a model that does not keep to the mask of a streaming layout.

        Raises:
            ModelError: it does not.
        """

        def states(ids, layout):
            device = self.head.weight.device
            row = torch.tensor([ids], device=device)
            positions = torch.tensor([layout.positions().tolist()], device=device)
            return self._states(row, positions, [0, len(ids)], [layout])

        training = self.training
        self.eval()
        weight = self.head.weight
        for cast in attention.casts(self.model.config._attn_implementation, weight):
            with torch.autocast(weight.device.type, torch.bfloat16, enabled=cast):
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
        """Hidden states [L, H] of a packed row; ids and positions are [1, L]."""
        implementation = self.model.config._attn_implementation
        masks = attention.arguments(implementation, bounds, layouts, self.head.weight)
        if frames is None:
            inputs = {"input_ids": input_ids}
        else:
            inputs = {"inputs_embeds": self.embed(self.model, input_ids, frames)}
        output = self.model.base_model(
            **inputs, position_ids=position_ids, use_cache=False, **masks
        )
        return output.last_hidden_state[0]

    def hidden(self, batch) -> torch.Tensor:
        """Hidden states [T, H] that predict the micro-batch's targets.

        The scale of a model's logits is in them, so the head is a linear one for all models.
        """
        states = self._states(
            batch.input_ids, batch.position_ids, batch.bounds, batch.layouts, batch.frames
        )
        states = states.index_select(0, batch.rows)
        return states if self.logit_scale == 1 else states * self.logit_scale

    def forward(self, batch, function):
        """Run `function(head, hidden [T, H], batch)` on a micro-batch."""
        return self.head(self.hidden(batch), function, batch)

    def start_training(self, dropout: bool, gradient_checkpointing: bool) -> None:
        """Choose how forward passes are made in updates.

        Args:
            dropout: keep the model's own. Without it all modules are as in evaluation, so dropout
                of any kind is off: of weights, activations, attention and whole layers.
            gradient_checkpointing: `model.gradient_checkpointing`.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.train(dropout)
        if not gradient_checkpointing:
            return
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if dropout:
            return
        for layer in self.model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                _checkpoint_in_evaluation(layer)


def _checkpoint_in_evaluation(layer: nn.Module) -> None:
    """Let a layer of transformers be checkpointed while it computes as in evaluation.

    transformers checkpoints a layer only where `layer.training`, a flag that also turns on the
    layer's dropout. So the flag is set around the layer's forward, and not in it.
    """
    checkpoint = layer._gradient_checkpointing_func

    def checkpointed(function, *arguments):
        def run(*arguments):
            layer.training = False
            try:
                return function(*arguments)
            finally:
                layer.training = True

        return checkpoint(run, *arguments)

    layer._gradient_checkpointing_func = checkpointed
    layer.training = True


def logit_scale(config) -> float:
    """What a model multiplies its logits with: Cohere's `logit_scale`, Granite's divisor."""
    scale, divisor = (getattr(config, name, 1) for name in ("logit_scale", "logits_scaling"))
    # MPT's scale may be None or a word.
    return scale / divisor if isinstance(scale, (int, float)) else 1.0


def _close(values: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    """The norm of the difference is at most `bound` times that of what is expected."""
    error = torch.linalg.vector_norm(values.float() - expected.float())
    return bool(error <= bound * torch.linalg.vector_norm(expected.float()))


def load_policy(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str = "packed",
    masked: bool = False,
    embed: Callable | None = None,
    missing: Sequence[int] = (),
    adapt: Callable[[nn.Module], None] | None = None,
    trust_remote_code: bool = False,
) -> Policy:
    """Load a model folder or hub name.

    Args:
        path: the folder or name.
        dtype: of the weights.
        device: where they go.
        attn_implementation: `model.attn_implementation`.
        masked: sequences will come with masks and positions of a streaming layout.
        embed: makes input embeddings of sources that are no text.
        missing: ids that are no tokens; they get a probability of 0.
        adapt: changes the loaded model in place, as LoRA does.
        trust_remote_code: run the code that comes with the model, if it needs it.

    Raises:
        ModelError: the model cannot be loaded, does not keep to the masks of a layout, or cannot
            leave out an id.
    """
    attention.register()
    check_fits(path, dtype, device, trust_remote_code)
    model = load_model(
        path, trust_remote_code, dtype=dtype, attn_implementation=attn_implementation
    )
    drop_unused_sampling(model)
    model = model.to(device)
    if adapt is not None:
        adapt(model)
    policy = Policy(model, embed)
    policy.head.leave_out(missing)
    if masked:
        policy.check_layouts()
    return policy


def check_model(key: str, path: str, trust_remote_code: bool = False):
    """The tokenizer and config of a model, before any weight is read.

    Args:
        key: the config key that names the model.
        path: its value, a folder or hub name.
        trust_remote_code: run the code that comes with the model, if it needs it.

    Returns:
        (tokenizer, config). The tokenizer's `stop_ids` are its end token and those of the model's
        two configs.

    Raises:
        ModelError: there is no such folder or hub model, it needs code of its own that is not
            trusted, or it has no end token. The message names `key`.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = model_folder(path)
    local = Path(folder)
    if not local.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        hint = "" if "/" in path else nearest(path, known_names())
        raise ModelError(f"{key}={path}: no such folder{hint}")
    try:
        # Without a value, transformers asks on a terminal whether to run the code.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        if "trust_remote_code" in str(error):
            raise needs_own_code(key, path) from error
        where = (
            "is not a model folder"
            if local.is_dir()
            else "is neither a folder nor a model the hub gave"
        )
        raise ModelError(f"{key}={path} {where}: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{key}={path}: its tokenizer has no end token (eos_token)")
    configs = [config]
    with contextlib.suppress(OSError):
        configs.append(GenerationConfig.from_pretrained(folder))
    stop_ids = [tokenizer.eos_token_id]
    for one in configs:
        ends = getattr(one, "eos_token_id", None)
        if ends is not None:
            stop_ids += ends if isinstance(ends, list) else [ends]
    tokenizer.stop_ids = tuple(dict.fromkeys(stop_ids))
    return tokenizer, config


def check_architecture(
    key: str, path: str, config, attn_implementation: str, trust_remote_code: bool = False
) -> None:
    """Refuse by its config a model that could not be trained rightly, before any weight is read.

    Args:
        key: the config key that names the model.
        path: its value, for the message.
        config: the model's.
        attn_implementation: `model.attn_implementation`.
        trust_remote_code: the model's own class counts, if it comes with one.

    Raises:
        ModelError: the model reads more than text, is no causal language model, needs code of its
            own that is not trusted, keeps a state besides keys and values, or computes its
            attention in its own way.
    """
    text = config.get_text_config()
    if text is not config:
        found = _model_class(path, text, False)
        hint = f"save its text model by itself, as {found.__name__}" if found else "not supported"
        raise ModelError(
            f"{key}={path}: {config.model_type} is a text model inside a larger one "
            f"(text_config); {hint}"
        )
    model = _model_class(path, config, trust_remote_code)
    if model is None and AUTO_CLASS in getattr(config, "auto_map", {}):
        raise needs_own_code(key, path)
    if model is None:
        raise ModelError(f"{key}={path}: {config.model_type} is no causal language model")
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    others = sorted(layers - {"sliding_attention"})
    if model._is_stateful or others:
        what = f"{others[0]} layers" if others else "layers with a state"
        raise ModelError(
            f"{key}={path}: {config.model_type} has {what}, in which packed sequences would see "
            "one another; not supported"
        )
    if attn_implementation == attention.NAME and not (
        model._supports_attention_backend and model._supports_sdpa
    ):
        other = "sdpa" if model._supports_sdpa else "eager"
        raise ModelError(
            f"{key}={path}: {config.model_type} computes its attention in its own way; "
            f"use model.attn_implementation={other}"
        )
    if attn_implementation == "sdpa" and caps_attention(config):
        raise ModelError(
            f"{key}={path}: {config.model_type} caps its attention scores, which "
            "model.attn_implementation=sdpa cannot; use packed"
        )


def _model_class(path: str, config, trust_remote_code: bool):
    """The class of a causal language model by its config; None: there is none.

    Args:
        path: the model's folder or hub name, where code of its own is.
        config: the model's.
        trust_remote_code: that code may run.
    """
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = getattr(config, "auto_map", {}).get(AUTO_CLASS)
    if trust_remote_code and own:
        return get_class_from_dynamic_module(own, model_folder(path))
    return AutoModelForCausalLM._model_mapping.get(type(config), None)


def unshared_tokens(
    student,
    teacher,
    student_path: str,
    teacher_path: str,
    section: str = "teacher",
    hint: str = "",
) -> dict[int, str]:
    """The added tokens that mean something else to the teacher, or nothing, by their ids.

    Models of one family differ in them, as Qwen2.5 has no `<think>`. A sample must hold none.

    Args:
        student, teacher: their tokenizers.
        student_path, teacher_path: their names, for the message.
        section: of the teacher, for the message.
        hint: what may be used in place of one tokenizer, for the message.

    Raises:
        ModelError: they differ in other tokens, or in one that ends a completion; it is named.
    """
    added = student.get_added_vocab() | teacher.get_added_vocab()
    differing = sorted(
        (token_id, token)
        for token, token_id in student.get_vocab().items() ^ teacher.get_vocab().items()
    )
    ends = {*student.stop_ids, *teacher.stop_ids}
    for token_id, token in differing:
        if token not in added or token_id in ends:
            raise ModelError(
                f"{section}.path={teacher_path} has another vocabulary than model.path="
                f"{student_path}: token {token!r} (id {token_id}) is only in one of them; "
                f"distillation needs one tokenizer{hint}"
            )
    # The first of two tokens with one id.
    return dict(reversed(differing))
