"""Makes an untrained model for some data: a Qwen3 decoder and a tokenizer learned from its texts.

    python -m scripts.new_model out=DIR data=translation
    python -m scripts.new_model out=DIR data=translation vocab=4000 hidden=128 layers=2 heads=4
    python -m scripts.new_model out=DIR data=FOLDER data.prompt_column=en data.target_column=de

`data` is anything that `data.path` takes, and every other key of the config's `data` works too.
`model.path=DIR` then trains the model.

The tokenizer is a byte-level BPE. A word with the space before it is encoded by itself, and so is
each digit. The one special token, <|endoftext|>, ends and pads texts. No token begins them
(bos_token is None), and there is no chat template.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from recipes.errors import ConfigError
from recipes.registry import nearest
from scripts.cli import compose_values, key_values, launch, run_command, whole_number

END = "<|endoftext|>"
SHORT_KEYS = {"data": "data.path"}
OWN_KEYS = {
    "out": "New folder for the model.",
    "vocab": "The most tokens of the tokenizer, for sources and targets together; default: 8000.",
    "hidden": "Width of the model, an even multiple of heads; default: 256.",
    "layers": "Number of layers; default: 4.",
    "heads": "Number of attention heads in a layer; default: 4.",
    "seed": "Seed of the random weights; default: 0.",
}
SMALLEST_VOCAB = 257  # a token per byte, and the end token
CONTEXT = 2048  # tokens
# Words with the space before them, single digits, runs of other signs, white space.
WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, under the names of their keys, with their defaults."""

    vocab: int = 8000
    hidden: int = 256
    layers: int = 4
    heads: int = 4


def main(arguments: list[str]) -> int:
    """Make the model that the arguments describe; returns the exit status."""
    return run_command(print_new_model, arguments, __doc__, SHORT_KEYS | OWN_KEYS)


def print_new_model(arguments: list[str]) -> None:
    print(make(arguments))


def make(arguments: list[str]) -> str:
    """Write the model that the arguments describe; returns a line about it.

    Raises:
        ConfigError: an unknown or missing key, or an impossible value.
        DataError: the data cannot be used.
    """
    import torch
    from transformers import Qwen3ForCausalLM

    folder, sizes, config = parse(arguments)
    texts = list(texts_of(config))
    tokenizer = learn_tokenizer(texts, sizes.vocab)
    torch.manual_seed(config.seed)
    shape = qwen3(tokenizer, hidden=sizes.hidden, layers=sizes.layers, heads=sizes.heads)
    model = Qwen3ForCausalLM(shape)
    try:
        save(folder, model, tokenizer)
    except OSError as error:
        raise ConfigError(
            f"out={folder}: cannot be written: {error}; choose another folder"
        ) from error
    word_count = sum(len(text.split()) for text in texts)
    token_count = sum(map(len, tokenizer(texts).input_ids))
    return (
        f"{folder}: {model.num_parameters() / 1e6:.2f}M parameters, {len(tokenizer)} tokens, "
        f"{token_count / word_count:.2f} of them per word of {len(texts)} texts"
    )


def parse(arguments: list[str]):
    """The new folder, the sizes, and the config with the data and the seed.

    Raises:
        ConfigError: an unknown or missing key, or an impossible value.
    """
    values = key_values(
        arguments,
        SHORT_KEYS,
        module="scripts.new_model",
        usage="out=DIR data=NAME_OR_FILE",
        required=("out", "data"),
    )
    check_keys(values)
    folder = Path(values.pop("out")).expanduser()
    if folder.exists():
        raise ConfigError(f"out={folder} exists; give a new folder, or delete it")
    sizes = take_sizes(values)
    return folder, sizes, compose_values({"recipe": "sft"} | values)


def check_keys(keys: Iterable[str]) -> None:
    """Raises ConfigError: a key is no size and none of the config's `data`."""
    from recipes.compose import schema_keys

    sizes = {field.name for field in fields(Sizes)}
    data_keys = {key for key in schema_keys() if key.startswith("data.")}
    valid = {"out", "data", "seed"} | sizes | data_keys
    for key in keys:
        if key not in valid:
            raise ConfigError(f"there is no key '{key}'{nearest(key, valid)}")


def take_sizes(values: dict[str, str]) -> Sizes:
    """Remove the sizes from the arguments, and return them.

    Raises:
        ConfigError: a size is no whole number, or the sizes do not fit together.
    """
    given = {}
    for field in fields(Sizes):
        given[field.name] = whole_number(field.name, values.pop(field.name, str(field.default)), 1)
    sizes = Sizes(**given)
    if sizes.vocab < SMALLEST_VOCAB:
        raise ConfigError(
            f"vocab={sizes.vocab} must be {SMALLEST_VOCAB} or more: "
            "one token per byte, and the end token"
        )
    # Rotary positions turn pairs of a head's channels.
    if sizes.hidden % (2 * sizes.heads):
        raise ConfigError(f"hidden={sizes.hidden} must be an even multiple of heads={sizes.heads}")
    return sizes


def texts_of(config) -> Iterator[str]:
    """The sources and targets of the data."""
    from rollouts.data.load import configured_examples

    # The user's seed is that of the weights; generated data is always that of seed 0.
    for example in configured_examples(config.data, seed=0):
        yield from (message["content"] for message in example.messages)
        if example.solution is not None:
            yield example.solution


def learn_tokenizer(
    texts: Iterable[str], vocab: int, special: Sequence[str] = (END,), end: str = END
):
    """A byte-level BPE tokenizer that encodes any text, and decodes it as it was.

    A text's ids are those of its words joined: a word with the space before it is encoded by
    itself. So are each digit and each run of other signs.

    Args:
        vocab: the most tokens.
        special: the special tokens; the first one pads.
        end: the special token that ends texts.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    word_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, word_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(special),
        show_progress=False,
        # Every byte has a token, so that any text encodes.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=special[0],
        model_max_length=CONTEXT,
    )


def qwen3(tokenizer, *, hidden: int, layers: int, heads: int, vocab: int = 0):
    """The config of a small Qwen3 decoder.

    Args:
        vocab: the rows of its embedding; 0 for as many as there are tokens.
    """
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
    """Write a model folder, in which generation ends on the tokenizer's end token."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    launch(main)
