"""Tiny random models of the families that the matrix has a row for, and their one tokenizer.

Each has what makes its family different: soft-caps, scaled logits, windows shorter than the
sequences, biases, experts. Each has more rows in its head than its tokenizer has tokens, and two
end tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HIDDEN, HEADS, HEAD_SIZE = 64, 2, 32
PADDING_ROWS = 14
WINDOW = 8  # tokens; every prompt is longer
CONTEXT = 512  # tokens
END, END_OF_TURN = "<|endoftext|>", "<|im_end|>"


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        title: how people call it.
        model_type: of its config, in transformers.
        shown: what this model has of the family's own.
        options: of its config, besides the sizes.
        tied: whether the head is the embeddings' matrix.
    """

    title: str
    model_type: str
    shown: str
    options: dict[str, Any] = field(default_factory=dict)
    tied: bool = True


WINDOWED = {"sliding_window": WINDOW}
ALTERNATING = WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": Family(
        "Llama", "llama", "scaled rotary positions", {"rope_parameters": LLAMA3_ROPE}, tied=False
    ),
    "llama-tied": Family("Llama, tied", "llama", "tied head"),
    "mistral": Family("Mistral", "mistral", "window", WINDOWED, tied=False),
    "qwen2": Family("Qwen2", "qwen2", "biases, tied head"),
    "qwen2.5": Family(
        "Qwen2.5",
        "qwen2",
        "biases, untied head",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        tied=False,
    ),
    "qwen3": Family("Qwen3", "qwen3", "normalised queries and keys"),
    "qwen3-moe": Family("Qwen3-MoE", "qwen3_moe", "experts", EXPERTS, tied=False),
    "gemma2": Family(
        "Gemma 2",
        "gemma2",
        "soft-caps of attention and logits, window",
        ALTERNATING
        | {
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 4,
        },
    ),
    "gemma3": Family(
        "Gemma 3, text",
        "gemma3_text",
        "window, two rotary bases",
        ALTERNATING | {"query_pre_attn_scalar": 16},
    ),
    "phi3": Family("Phi-3", "phi3", "fused matrices, window", WINDOWED, tied=False),
    "olmo2": Family("OLMo 2", "olmo2", "norms after attention", tied=False),
    "smollm3": Family("SmolLM3", "smollm3", "layers without positions", {"no_rope_layers": [1, 0]}),
    "glm4": Family(
        "GLM-4", "glm4", "half-rotary positions, biases", {"attention_bias": True}, tied=False
    ),
    "gpt2": Family("GPT-2", "gpt2", "learned positions, biases, transposed matrices"),
    "granite": Family(
        "Granite",
        "granite",
        "scaled logits, embeddings and residuals",
        {
            "logits_scaling": 3.0,
            "embedding_multiplier": 4.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
        },
    ),
    "cohere": Family("Cohere", "cohere", "scaled logits, parallel blocks", {"logit_scale": 0.25}),
    "cohere2": Family(
        "Cohere2", "cohere2", "scaled logits, window", ALTERNATING | {"logit_scale": 0.25}
    ),
}


def config_of(family: Family, tokenizer):
    """The config of the family's tiny model."""
    from transformers import AutoConfig

    options = {
        "vocab_size": len(tokenizer) + PADDING_ROWS,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": family.tied,
        "initializer_range": 0.1,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family.model_type == "gpt2":
        for name in ("intermediate_size", "num_key_value_heads", "head_dim"):
            del options[name]
    return AutoConfig.for_model(family.model_type, **options | family.options)


def make(family: Family, folder: Path, tokenizer, seed: int = 0) -> Path:
    """Write a model of the family with random weights; returns its folder."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases begin as zeros and norms as ones: neither would show a fault.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ends = tokenizer.convert_tokens_to_ids([END, END_OF_TURN])
    model.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
