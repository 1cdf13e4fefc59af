"""What the files of a pretrained model say, read as it is meant."""

from __future__ import annotations

SAMPLING_SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)


def token_count(tokenizer) -> int:
    """One more than a tokenizer's largest id.

    The `len` of a tokenizer is less where it has no token for an id below the largest.
    """
    return max(tokenizer.get_vocab().values()) + 1


def vocabulary(tokenizer, *models) -> tuple[int, tuple[int, ...]]:
    """The ids that are tokens: `vocab` and `missing`, as in `Sampling`.

    Args:
        models: configs of models, whose heads may have fewer rows.
    """
    taken = set(tokenizer.get_vocab().values())
    vocab = min([max(taken) + 1, *(model.get_text_config().vocab_size for model in models)])
    return vocab, tuple(id for id in range(vocab) if id not in taken)


def context_length(config) -> int | None:
    """The longest sequence of a model, in tokens, by its config; None if that states none."""
    config = config.get_text_config()
    # transformers gives other names, as GPT-2's n_positions, under the first one as well.
    lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    return next((length for length in lengths if length), None)


def caps_attention(config) -> bool:
    """Whether a model bounds its attention scores, which torch's own attention (sdpa) cannot."""
    return getattr(config, "attn_logit_softcapping", None) is not None


def drop_unused_sampling(model) -> None:
    """Clear the sampling settings of a generation config that is greedy, where they do nothing.

    transformers loads a config with such settings, and then refuses to save it.
    """
    config = model.generation_config
    if config is not None and not config.do_sample:
        for name in SAMPLING_SETTINGS:
            setattr(config, name, None)
