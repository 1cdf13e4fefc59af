"""What the files of a pretrained model say, read as it is meant."""

from __future__ import annotations

from recipes.embedded import model_folder
from recipes.errors import ModelError, first_line

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


def load_model(path: str, trust_remote_code: bool, **options):
    """A causal language model with its weights.

    Args:
        path: a model folder or hub name.
        trust_remote_code: run the code that comes with the model, if it needs it.
        options: of transformers' `from_pretrained`.

    Raises:
        ModelError: it cannot be loaded, as where weights are missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    folder = model_folder(path)
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **options
        )
    # RuntimeError: weights of other shapes than the config says, or no memory.
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {path} cannot be loaded: {first_line(error)}") from error


def needs_own_code(key: str, path: str) -> ModelError:
    """The error of a model whose code may not run.

    Args:
        key: the config key that names the model.
        path: its value.
    """
    section = key.partition(".")[0]
    return ModelError(
        f"{key}={path} loads only with Python code that comes with the model and is not part of "
        "transformers; such code can do whatever you can on this machine, so read it, and then set "
        f"{section}.trust_remote_code=true"
    )


def token_count(tokenizer) -> int:
    """One more than a tokenizer's largest id.

    The `len` of a tokenizer is less where it has no token for an id below the largest.
    """
    return max(tokenizer.get_vocab().values()) + 1


def vocabulary(tokenizer, *models, unshared=()) -> tuple[int, tuple[int, ...]]:
    """The ids that are tokens: `vocab` and `missing`, as in `Sampling`.

    Args:
        models: configs of models, whose heads may have fewer rows.
        unshared: ids that are left out because another model has other tokens there.
    """
    taken = set(tokenizer.get_vocab().values())
    vocab = min([max(taken) + 1, *(model.get_text_config().vocab_size for model in models)])
    known = taken.difference(unshared)
    return vocab, tuple(id for id in range(vocab) if id not in known)


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
