"""Fixtures that tests of several modules here use."""

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
def byte_tokenizer():
    """Byte-level BPE with other merges than the tiny models', and an end token of its own."""
    from rollouts.data.stories import story
    from scripts.new_model import learn_tokenizer

    texts = [story(0, index, "train").solution for index in range(50)]
    return learn_tokenizer(texts, 300, ("<stop>",), "<stop>")


@pytest.fixture(scope="session")
def space_tokenizer():
    """As Llama 2's: `▁` for a space, one put before each text, and a token for each byte."""
    import json

    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from rollouts.data.stories import story

    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    texts = [story(1, index, "train").prompt for index in range(50)]
    special = ["<unk>", "<s>", "</s>"]
    learned.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
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
