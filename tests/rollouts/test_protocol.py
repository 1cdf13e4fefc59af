"""The protocol's tokens: found, missed, and added to a model with and without room for them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.errors import ModelError
from rollouts.data.marks import TOKENS
from rollouts.streaming.tokens import Protocol, add_tokens, extend_model, missing
from scripts.tiny_models import TinyModel, initialise


def test_a_tokenizer_without_the_tokens_is_one_line(tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["student"])
    with pytest.raises(
        ModelError, match="no token <SEP>, which streaming needs; run recipe=streaming_sft"
    ) as caught:
        Protocol.of(tokenizer)
    assert "\n" not in str(caught.value) and str(tiny_models["student"]) in str(caught.value)


def test_added_tokens_are_single_ids_after_all_others(tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["student"])
    size, ends = len(tokenizer), (tokenizer.eos_token_id, tokenizer.pad_token_id)
    tokenizer.add_tokens(["<EOT>"], special_tokens=True)  # one was there already
    assert (
        add_tokens(tokenizer) == [token for token in TOKENS if token != "<EOT>"]
        and missing(tokenizer) == []
    )
    protocol = Protocol.of(tokenizer)
    assert sorted(protocol.ids) == list(range(size, size + 7)) and protocol.eot == size
    assert tokenizer("a <skip>", add_special_tokens=False).input_ids[-1] == protocol.skip
    assert tokenizer.decode([protocol.skip, protocol.eoa]).replace(" ", "") == "<skip><EOA>"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == ends
    assert add_tokens(tokenizer) == []


@pytest.mark.parametrize("room", [0, 64])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old_and_the_rest_stays(tmp_path, room, tied):
    initialise(
        tmp_path / "old", TinyModel(end="<|endoftext|>", steps=0, seed=0, hidden=32, layers=1)
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "old")
    size = len(tokenizer)
    config = json.loads((tmp_path / "old" / "config.json").read_text()) | {
        "tie_word_embeddings": tied
    }
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    if not tied:
        torch.nn.init.normal_(model.lm_head.weight)
    if room:
        model.resize_token_embeddings(size + room, mean_resizing=False)
    model.save_pretrained(tmp_path / "old")

    new = add_tokens(tokenizer)
    folder = extend_model(str(tmp_path / "old"), tokenizer, new, tmp_path / "run" / "start")
    made = AutoModelForCausalLM.from_pretrained(folder)
    assert made.config.vocab_size == made.lm_head.weight.shape[0] == max(size + 7, size + room)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied
    for ours, theirs in (
        (made.model.embed_tokens.weight, model.model.embed_tokens.weight),
        (made.lm_head.weight, model.lm_head.weight),
    ):
        assert torch.equal(ours[:size], theirs[:size])
        torch.testing.assert_close(ours[size : size + 7], theirs[:size].mean(0).expand(7, -1))
    assert Protocol.of(AutoTokenizer.from_pretrained(folder)) == Protocol.of(tokenizer)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(made(ids).logits[..., :size], model(ids).logits[..., :size])

    written = (folder / "model.safetensors").stat().st_mtime_ns
    # it is there: a resumed run takes it
    assert extend_model("/gone", tokenizer, new, folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
