"""What the files of a pretrained model say, read as it is meant."""

from __future__ import annotations


def token_count(tokenizer) -> int:
    """One more than a tokenizer's largest id. Its `len` is less where ids are left out below that
    one."""
    return max(tokenizer.get_vocab().values()) + 1


def drop_unused_sampling(model) -> None:
    """Clear the sampling settings of a generation config that is greedy: they do nothing, and
    transformers, which loads such a config, refuses to save it."""
    config = model.generation_config
    if config is not None and not config.do_sample:
        for name in (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "top_h",
            "typical_p",
            "epsilon_cutoff",
            "eta_cutoff",
        ):
            setattr(config, name, None)
