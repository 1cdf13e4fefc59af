"""A rollout engine on Hugging Face models: batched decoding with a key-value cache.

It needs nothing but transformers. So it carries a full run where vLLM is not installed. It keeps
its own copy of the weights, on the trainer's device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rollouts.engines.decoding import Decoding
from rollouts.pretrained import caps_attention, load_model
from rollouts.sync import fingerprint
from rollouts.trajectory import Request, Sampling, Trajectory


class HuggingFaceEngine:
    """Samples completions with `transformers`.

    Each completion draws its uniforms from a generator of its own and inverts the CDF. So its noise
    does not depend on what it is batched with. The logits may, in the last bits, as the shape of
    the batch changes.
    """

    def __init__(self, path: str, config, device: torch.device, dtype: torch.dtype, **_):
        self.device, self.batch_size = device, config.rollout.batch_size
        model = load_model(path, config.model.trust_remote_code, dtype=dtype)
        if caps_attention(model.config):
            model.set_attn_implementation("eager")
        self.model = model.to(device).eval().requires_grad_(False)
        # Duplicates stay: a tied head is known by its own name too.
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        continues: bool = False,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Trajectory]:
        """Draw one trajectory per request, in their order (rollouts/engines/base.py).

        `continues` has no effect: this engine caches no prefixes between calls.
        """
        # Requests of similar length share a batch, so that little of it is padding.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        trajectories: dict[int, Trajectory] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            completions = self._batch([requests[i] for i in batch], sampling)
            trajectories.update(zip(batch, completions))
            if on_finished is not None:
                on_finished(len(batch))
        return [trajectories[i] for i in range(len(requests))]

    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        """Draw one trajectory per request; all of them are decoded together."""
        from rollouts.engines.cache import CausalCache

        limits = [sampling.max_new_tokens] * len(requests)
        decoding = Decoding(requests, sampling, limits, self.device)
        cache = CausalCache(self.model, len(requests))
        ids, attention = left_padded(requests)
        ids, attention = ids.to(self.device), attention.to(self.device)
        while len(decoding.live):
            logits = cache.append(ids, attention)
            tokens, logprobs = decoding.propose(logits)
            decoding.write(tokens=tokens, logprobs=logprobs)
            decoding.leave(decoding.on_stop(tokens), decoding.full, cache)
            ids = decoding.newest[:, None]
            attention = torch.ones_like(ids)
        return [
            Trajectory(
                request.prompt_index,
                request.sample_index,
                list(request.prompt_ids),
                written["tokens"].tolist(),
                finish_reason,
                written["logprobs"],
            )
            for request, written, finish_reason in decoding.completions()
        ]

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the trainer's tensors in place; names are those of the Hugging Face checkpoint."""
        for name, tensor in weights:
            self.parameters[name].copy_(tensor)

    def fingerprints(self, names: Sequence[str], salt: int) -> dict[str, int | None]:
        """The fingerprint of each named tensor; None where the engine holds no such tensor."""
        return {
            name: fingerprint(self.parameters[name], name, salt)
            if name in self.parameters
            else None
            for name in names
        }

    def sleep(self) -> None:
        """Nothing to free: the weights are the engine's only memory between calls."""

    def wake(self) -> None:
        """The weights never left."""

    def close(self) -> None:
        """Drop the weights."""
        self.model = self.parameters = None


def left_padded(requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """Ids and attention [B, n] of the prompts, whose last tokens are all in the last column."""
    prompts = [torch.tensor(request.prompt_ids, dtype=torch.long) for request in requests]
    ids, attention = (
        pad_sequence(rows, batch_first=True, padding_side="left")
        for rows in (prompts, [torch.ones_like(prompt) for prompt in prompts])
    )
    return ids, attention
