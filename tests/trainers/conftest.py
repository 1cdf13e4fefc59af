"""Fixtures that tests of several modules here use."""

import json
import resource

import pytest


@pytest.fixture
def small_files():
    """No file can grow past 100 kB: writes fail as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="session")
def other_texts():
    """What the tokenizers below are learned from: numbers are whole, and words go together."""
    from rollouts.data.stories import story

    numbers = [f"{n} - {n // 2} = {n - n // 2}.\n\nThe answer is {n} é漢🙂" for n in range(100)]
    return [*numbers, *(story(0, index, "train", difficulty=3).prompt for index in range(50))]


@pytest.fixture(scope="session")
def byte_tokenizer(other_texts):
    """Byte-level BPE with other merges than the tiny models', and an end token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<stop>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learned.train_from_iterator(other_texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=learned, eos_token="<stop>")


@pytest.fixture(scope="session")
def space_tokenizer(other_texts):
    """As Llama 2's: `▁` for a space, one put before each text, and a token for each byte."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=special, show_progress=False)
    learned.train_from_iterator(other_texts, trainer)
    state = json.loads(learned.to_str())
    vocab = state["model"]["vocab"]
    state["model"] |= {"byte_fallback": True, "fuse_unk": True}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.pre_tokenizer = None
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    parts = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
