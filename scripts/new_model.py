"""Makes an untrained model for some data: a Qwen3 decoder with random weights, and a tokenizer
learned from its texts.

    python -m scripts.new_model out=DIR data=translation [vocab=8000 hidden=256 layers=4 heads=4 seed=0]
    python -m scripts.new_model out=DIR data=FOLDER data.prompt_column=en data.target_column=de

`data` is anything `data.path` takes, and every other key of the config's `data` works too.
`model.path=DIR` then trains it. The tokenizer is a byte-level BPE of at most `vocab` tokens for
sources and targets together; a word with the space before it is encoded by itself, and so is each
digit. It has one special token, <|endoftext|>, which ends and pads texts; none begins them
(bos_token is None), and there is no chat template."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from scripts.cli import print_error, quiet_libraries

END = "<|endoftext|>"
SIZES = {"vocab": 8000, "hidden": 256, "layers": 4, "heads": 4}  # and their defaults
SMALLEST = 257  # tokens: one per byte, and the end token
CONTEXT = 2048  # tokens


def main(arguments: list[str]) -> int:
    """Returns the exit status; a mistake of the user's ends in one line on stderr."""
    from recipes.errors import OnstreamError

    try:
        print(make(arguments))
        return 0
    except OnstreamError as error:
        print_error(error)
        return 1


def make(arguments: list[str]) -> str:
    """Write the model that the arguments ask for; returns a line on it.

    Raises:
        ConfigError: an unknown or missing key, or an impossible value.
        DataError: the data cannot be used.
    """
    import torch
    from transformers import Qwen3ForCausalLM

    from recipes.errors import ConfigError

    folder, sizes, config = read(arguments)
    texts = list(texts_of(config))
    tokenizer = learn_tokenizer(texts, sizes["vocab"])
    torch.manual_seed(config.seed)
    model = Qwen3ForCausalLM(
        qwen3(tokenizer, hidden=sizes["hidden"], layers=sizes["layers"], heads=sizes["heads"])
    )
    try:
        save(folder, model, tokenizer)
    except OSError as error:
        raise ConfigError(
            f"out={folder}: cannot be written: {error}; choose another folder"
        ) from error
    words = sum(len(text.split()) for text in texts)
    tokens = sum(map(len, tokenizer(texts).input_ids))
    return (
        f"{folder}: {model.num_parameters() / 1e6:.2f}M parameters, {len(tokenizer)} tokens, "
        f"{tokens / words:.2f} of them per word of {len(texts)} texts"
    )


def read(arguments: list[str]):
    """(folder, the sizes, the config of the data and the seed)."""
    from recipes.compose import compose, schema_keys
    from recipes.errors import ConfigError
    from recipes.registry import nearest
    from scripts.evaluate import key_values

    given = key_values(
        arguments,
        {"data": "data.path"},
        "scripts.new_model",
        "out=DIR data=NAME_OR_FILE",
        ("out", "data"),
    )
    valid = {
        "out",
        "data",
        "seed",
        *SIZES,
        *(key for key in schema_keys() if key.startswith("data.")),
    }
    if odd := next((key for key in given if key not in valid), None):
        raise ConfigError(f"there is no key '{odd}'{nearest(odd, valid)}")
    folder = Path(given.pop("out")).expanduser()
    if folder.exists():
        raise ConfigError(f"out={folder} exists; give a new folder, or delete it")
    sizes = {}
    for key, default in SIZES.items():
        value = given.pop(key, str(default))
        if not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"{key}={value} must be a whole number, 1 or more")
        sizes[key] = int(value)
    if sizes["vocab"] < SMALLEST:
        raise ConfigError(
            f"vocab={sizes['vocab']} must be {SMALLEST} or more: one token per byte, and the end token"
        )
    if sizes["hidden"] % (2 * sizes["heads"]):  # rotary positions turn pairs
        raise ConfigError(
            f"hidden={sizes['hidden']} must be an even multiple of heads={sizes['heads']}"
        )
    return (
        folder,
        sizes,
        compose(["recipe=sft", *(f"{key}={value}" for key, value in given.items())]),
    )


def texts_of(config) -> Iterator[str]:
    """The sources and targets of the data. Generated data is that of seed 0: the seed is of the
    weights alone."""
    from rollouts.data.load import configured_examples

    for example in configured_examples(config.data, seed=0):
        yield from (message["content"] for message in example.messages)
        if example.solution is not None:
            yield example.solution


def learn_tokenizer(
    texts: Iterable[str], vocab: int, special: Sequence[str] = (END,), end: str = END
):
    """A byte-level BPE of at most `vocab` tokens, padded by the first special one; any text
    encodes, and decodes as it was. Letters, a digit or other signs, with a space before them, are
    encoded by themselves, so a text's ids are those of its words joined."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=list(special),
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=special[0], model_max_length=CONTEXT
    )


def qwen3(tokenizer, *, hidden: int, layers: int, heads: int, vocab: int = 0):
    """The config of a small Qwen3 decoder; `vocab`: rows of its embedding, 0 for as many as there
    are tokens."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=vocab or len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )


def save(folder: Path, model, tokenizer) -> None:
    """Write a model folder, whose generation ends on the tokenizer's end token."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main(sys.argv[1:]))
