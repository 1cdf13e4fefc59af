"""The special tokens that mark what a streaming reasoner reads and writes.

The source is read as `instruction <SEP>`, `question <EOQ>`, then `sentence <EOS>` again and again.
The target repeats the first two marks. It writes `thought <EOT>` or a lone `<skip>` per sentence,
then `deep reasoning <EOR> answer <EOA>`. This is the format of StreamingThinker (arXiv 2510.17238;
docs/specification.md, 3.1). `<skip>` is AdaSR's (arXiv 2606.14694).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recipes.errors import ModelError
from rollouts.data.marks import TOKENS
from rollouts.pretrained import drop_unused_sampling, load_model, token_count
from rollouts.trajectory import Sampling


@dataclass(frozen=True)
class StreamingSampling(Sampling):
    """How a streaming completion is sampled; the inherited limits are those of the deep segment."""

    # A thought ends on one of these tokens.
    thought_stops: tuple[int, ...] = ()
    # A thought has at most this many tokens, the closing one included.
    max_thought_tokens: int = 0
    # Closes a thought that reaches the limit.
    close_id: int | None = None


@dataclass(frozen=True)
class Protocol:
    """The ids of the protocol tokens in one vocabulary."""

    sep: int  # ends the instruction
    eoq: int  # ends the question
    eos: int  # ends a sentence; not the tokenizer's end token
    eot: int  # ends a thought
    eor: int  # ends the deep reasoning
    eoa: int  # ends the answer
    skip: int  # stands for a thought: read on

    @classmethod
    def of(cls, tokenizer) -> Protocol:
        """The ids that a tokenizer gives the tokens.

        Raises:
            ModelError: the tokenizer lacks one of the tokens.
        """
        if lacking := missing(tokenizer):
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no token {lacking[0]}, "
                "which streaming needs; run recipe=streaming_sft first, which adds it"
            )
        return cls(*tokenizer.convert_tokens_to_ids(list(TOKENS)))

    @property
    def ids(self) -> tuple[int, ...]:
        return self.sep, self.eoq, self.eos, self.eot, self.eor, self.eoa, self.skip


def missing(tokenizer) -> list[str]:
    """The protocol tokens that a tokenizer does not have as single tokens."""
    vocabulary = tokenizer.get_vocab()
    return [token for token in TOKENS if token not in vocabulary]


def add_tokens(tokenizer) -> list[str]:
    """Give a tokenizer the protocol tokens that it lacks, as special tokens, and return them."""
    new = missing(tokenizer)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": new}, replace_extra_special_tokens=False
    )
    return new


def extend_model(
    path: str, tokenizer, new: list[str], folder: Path, trust_remote_code: bool = False
) -> Path:
    """Write a copy of a model whose embedding has a row for each of the new tokens.

    A new row is the mean of the rows of the old tokens, in the embedding and in an untied head. A
    vocabulary with padding rows, as Qwen3's, keeps its size.

    Args:
        path: a model folder or hub name.
        tokenizer: a tokenizer with the new tokens.
        new: the new tokens.
        folder: where the copy goes, with the tokenizer. A copy that is there is taken as it is.
        trust_remote_code: run the code that comes with the model, if it needs it.

    Returns:
        `folder`.
    """
    import torch

    if (folder / "config.json").is_file():
        return folder
    model = load_model(path, trust_remote_code, dtype="auto")
    drop_unused_sampling(model)
    ids = sorted(tokenizer.convert_tokens_to_ids(new))
    if model.get_input_embeddings().weight.shape[0] < token_count(tokenizer):
        model.resize_token_embeddings(token_count(tokenizer), mean_resizing=False)
    # A tied head is written twice, with the same values.
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for tensor in (layer.weight, getattr(layer, "bias", None)):
                if tensor is not None:
                    tensor[ids] = tensor[: ids[0]].float().mean(0).to(tensor.dtype)
    work = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)
    work.rename(folder)
    return folder
