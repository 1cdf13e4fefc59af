"""The sampler's weights: after a sync its log-probs are those of the trainer's weights."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from recipes.components import ENGINES
from rollouts.sync import sync_weights
from rollouts.trajectory import Request, Sampling
from trainers.conformance.report import Case, require
from trainers.conformance.stand_ins import CPU
from trainers.conformance.subjects import composed
from trainers.core.batching import pack
from trainers.core.policy import Policy, load_policy
from trainers.core.scoring import score_tokens

# nats, between the two sides in float32.
GAP = 1e-4
VOCAB = 16


@functools.cache
def model_folder() -> tempfile.TemporaryDirectory:
    """A folder with a model of two thousand random weights; it goes with the process."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.5,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    folder = tempfile.TemporaryDirectory(prefix="onstream_conform_")
    Qwen3ForCausalLM(config).save_pretrained(folder.name)
    return folder


def updated_policy(path: str) -> Policy:
    """The trainer's policy after an update."""
    policy = load_policy(path, torch.float32, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return policy


def current_weights(name: str) -> None:
    """Sync, sample, and score the samples with the trainer's weights.

    Raises:
        Difference, SyncError: the samples come from other weights.
    """
    path = str(Path(model_folder().name))
    engine = ENGINES.resolve(name)(
        path, composed(("recipe=opd",)), CPU, torch.float32, max_length=32
    )
    policy = updated_policy(path)
    # The head is tied; both of its names are sent.
    named = dict(policy.model.named_parameters(remove_duplicate=False))
    sync_weights(engine, lambda: iter(named.items()), 1)
    requests = [Request(index, 0, (2, 3, 1 + index), seed=index) for index in range(4)]
    sampling = Sampling(max_new_tokens=6, temperature=0.8, stop_ids=(0,), vocab=VOCAB)
    drawn = engine.generate(requests, sampling)
    engine.close()
    batch = pack(drawn, range(len(drawn)), CPU)
    with torch.no_grad():
        hidden = policy.hidden(batch)
    scored = score_tokens(
        policy.head, hidden, targets=batch.targets, temperature=0.8, vocab=VOCAB
    ).logprobs
    sampled = torch.cat([torch.from_numpy(t.logprobs) for t in drawn])
    gap = float((scored - sampled).abs().max())
    require(
        gap < GAP,
        f"after a sync the sampler's log-probs differ from the trainer's by {gap:.3g} nats: it "
        "samples from stale weights",
    )


def of_engine(name: str) -> Iterator[Case]:
    """The check of an engine of plain completions, registered or from outside."""
    yield Case(f"rollout.engine={name}", "current weights", "", lambda: current_weights(name))


def cases() -> Iterator[Case]:
    """Of the engine that needs nothing but transformers."""
    yield from of_engine("hf")
