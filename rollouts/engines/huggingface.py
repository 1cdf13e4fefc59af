"""A rollout engine on Hugging Face models: batched decoding with a KV cache, one random stream per
completion.

It needs nothing but transformers, so it carries a full run where vLLM is not installed. It keeps a
copy of the weights of its own, in the same place as the trainer's."""

from __future__ import annotations

from typing import Callable, Iterable, Sequence

import numpy as np
import torch

from recipes.embedded import model_folder
from rollouts.sync import fingerprint
from rollouts.trajectory import Request, Sampling, Trajectory

BLOCK = 128  # tokens of the vocabulary whose weights are summed before one of them is looked for


class HuggingFaceEngine:
    """Samples completions with `transformers`.

    Each completion draws its uniforms from a generator of its own and inverts the CDF, so that its
    noise does not depend on what it is batched with; the logits may, in the last bits, as the shape
    of the batch changes."""

    def __init__(self, path: str, config, device: torch.device, dtype: torch.dtype, **_):
        from transformers import AutoModelForCausalLM

        self.device, self.batch_size = device, config.rollout.batch_size
        model = AutoModelForCausalLM.from_pretrained(model_folder(path), dtype=dtype)
        self.model = model.to(device).eval().requires_grad_(False)
        # a tied head has its name too
        self.parameters = dict(self.model.named_parameters(remove_duplicate=False))

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        continues: bool = False,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Trajectory]:
        """One trajectory per request, in their order; log-probs are at `sampling.temperature`, not
        truncated.

        `continues` says that the prompts go on from the call before: for engines that cache
        prefixes, this does not. `on_finished` is told, again and again, how many more completions
        are finished."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        done: dict[int, Trajectory] = {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for row, trajectory in zip(rows, self._batch([requests[i] for i in rows], sampling)):
                done[row] = trajectory
            if on_finished is not None:
                on_finished(len(rows))
        return [done[i] for i in range(len(requests))]

    def _batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        from rollouts.engines.cache import growing_cache

        width = max(len(r.prompt_ids) for r in requests)
        count = len(requests)
        ids = torch.zeros(count, width, dtype=torch.long)
        attention = torch.zeros(count, width + sampling.max_new_tokens, dtype=torch.long)
        # left padding: every row's next token is in the last column
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            attention[row, width - len(request.prompt_ids) :] = 1
        attention = attention.to(self.device)
        position = (attention[:, :width].cumsum(-1) - 1).clamp(min=0)
        uniforms = torch.stack(
            [
                torch.rand(
                    sampling.max_new_tokens,
                    generator=torch.Generator().manual_seed(r.seed),
                    dtype=torch.float64,
                )
                for r in requests
            ]
        ).to(self.device)
        stops = torch.tensor(sampling.stop_ids, dtype=torch.long, device=self.device)

        cache = growing_cache(self.model.config)
        tokens, logprobs = [[] for _ in requests], [[] for _ in requests]
        live = torch.arange(count, device=self.device)  # rows of `requests` still decoding
        finish = ["length"] * count
        ids = ids.to(self.device)
        for step in range(sampling.max_new_tokens):
            logits = (
                self.model(
                    input_ids=ids,
                    attention_mask=attention[:, : width + step],
                    position_ids=position,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                .logits[:, -1]
                .float()
            )
            chosen, chosen_logprobs = sample(logits, uniforms[live, step], sampling)
            ended = torch.isin(chosen, stops)
            for row, token, logprob, stop in zip(
                live.tolist(), chosen.tolist(), chosen_logprobs.tolist(), ended.tolist()
            ):
                tokens[row].append(token)
                logprobs[row].append(logprob)
                if stop:
                    finish[row] = "stop"
            if ended.all():
                break
            keep = (~ended).nonzero().flatten()
            if len(keep) < len(live):  # finished rows leave the batch
                cache.batch_select_indices(keep)
                live, chosen, attention, position = (
                    live[keep],
                    chosen[keep],
                    attention[keep],
                    position[keep],
                )
            ids, position = chosen[:, None], position[:, -1:] + 1
            attention[:, width + step] = 1
        return [
            Trajectory(
                r.prompt_index,
                r.sample_index,
                list(r.prompt_ids),
                tokens[i],
                finish[i],
                np.asarray(logprobs[i], dtype=np.float32),
            )
            for i, r in enumerate(requests)
        ]

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the trainer's tensors in place; names are those of the Hugging Face checkpoint."""
        for name, tensor in weights:
            self.parameters[name].copy_(tensor)

    def fingerprints(self, names: Sequence[str], salt: int) -> dict[str, int | None]:
        """The fingerprint of each named tensor as the engine holds it; None where it holds none."""
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


def sample(
    logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the CDF.

    Args:
        logits: [B, V] float32.
        uniforms: [B] float64 in [0, 1).

    Returns:
        token ids [B] int64, and their log-probs [B] in nats at the temperature, before top-k and
        top-p (at temperature 0: at temperature 1).
    """
    logits = logits[:, : sampling.vocab]
    if sampling.temperature == 0:
        chosen = logits.argmax(-1)
        return chosen, logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    probs = logits.softmax(-1)
    truncated = sampling.top_k > 0 or sampling.top_p < 1
    chosen = invert_cdf(truncate(probs.double(), sampling) if truncated else probs, uniforms)
    return chosen, probs.gather(-1, chosen[:, None])[:, 0].log()


def truncate(probs: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities [B, V] with zeros outside the `top_k` largest, and outside the `top_p` nucleus
    of those."""
    ranked, index = torch.sort(probs, dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if sampling.top_k > 0:
        keep[:, sampling.top_k :] = False
    if sampling.top_p < 1:  # of what top-k left, the smallest set whose mass reaches top_p
        left = ranked * keep
        before = left.cumsum(-1) - left
        keep &= before < sampling.top_p * left.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, index, ranked * keep)


def invert_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The index at which the cumulative sum of each row passes its uniform share of the total.

    In two levels, first among the sums of blocks, then within one: the cumulative sum of a large
    vocabulary is never made. A block is summed in the weights' dtype, everything else in float64.

    Args:
        weights: [B, V], not negative, any positive scale; one of zero is never chosen.
        uniforms: [B] float64 in [0, 1).

    Returns:
        [B] int64.
    """
    count, width = weights.shape
    if width % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, BLOCK - width % BLOCK))
    blocks = weights.view(count, -1, BLOCK)
    sums = blocks.sum(-1).double()
    target = uniforms * sums.sum(-1)
    block, before = passed(sums, target)
    inside = blocks[torch.arange(count, device=weights.device), block].double()
    place, _ = passed(inside, (target - before).clamp(min=0))
    # where weights are NaN, as in a run that diverged, any token
    return (block * BLOCK + place).clamp(max=width - 1)


def passed(weights: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the cumulative sum of float64 weights [B, N] passes `target` [B], and the sum before
    that place."""
    cdf = weights.cumsum(-1)
    place = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    # Rounding can put the target at the total: take the last place that has any weight.
    last = weights.shape[-1] - 1 - (weights.flip(-1) > 0).int().argmax(-1)
    place = torch.minimum(place, last)
    before = (cdf - weights).gather(-1, place[:, None])[:, 0]
    return place, before
