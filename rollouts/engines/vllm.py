"""The vLLM rollout engine, in the trainer's own process: one engine per rank, weights taken in
place.

vLLM's layers differ from the checkpoint's: query, key and value are one matrix, gate and up
another, and on a CPU each matrix is repacked for oneDNN after loading. `fingerprints` reads them
back exactly all the same, so that a tensor that did not arrive, or a stale packed copy of one that
did, is named instead of sampled from."""

from __future__ import annotations

import logging
import os
import time
from functools import partial
from typing import Callable, Iterable, Sequence

import numpy as np
import torch

from recipes.embedded import model_folder
from recipes.errors import ConfigError, ModelError
from rollouts.sync import checksum, sampled_columns
from rollouts.trajectory import Request, Sampling, Trajectory

# Fused matrices of vLLM's decoders: checkpoint name -> (vLLM name, position among its outputs).
FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class VllmEngine:
    """Samples completions with vLLM. Every request has a seed of its own, so the noise of a
    completion does not depend on the batch; the logits may, in the last bits (see docs/design.md,
    "Reproducible samples")."""

    def __init__(
        self, path: str, config, device: torch.device, dtype: torch.dtype, max_length: int, **_
    ):
        rollout = config.rollout
        # In-process, and quiet: both are read when vllm is imported.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        on_cpu = device.type == "cpu"
        if on_cpu:
            # Thread binding would pin the trainer's threads too, and every rank's to the same
            # cores.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            # 0.32 reads whole GiB here.
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(rollout.cpu_kv_cache_gib)))
        # it remarks on Triton while it is imported
        logging.getLogger("vllm").setLevel(logging.ERROR)
        try:
            if on_cpu:
                interpret_small_functions()
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ConfigError(
                f"rollout.engine=vllm, but vllm does not import here ({error}); "
                "install it, or use rollout.engine=hf"
            ) from error
        self.sampling_params = SamplingParams
        self.temperature_in_logprobs = rollout.temperature != 1
        self.can_sleep = rollout.sleep and not on_cpu
        distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        options = dict(
            model=model_folder(path),
            dtype=str(dtype).removeprefix("torch."),
            skip_tokenizer_init=True,
            seed=0,
            max_model_len=max_length,
            max_num_seqs=rollout.batch_size,
            enable_prefix_caching=True,
            # `external_launcher` takes this rank's GPU; on a CPU there is nothing to place.
            distributed_executor_backend="external_launcher"
            if distributed and not on_cpu
            else "uni",
            # The sampled token's log-prob at the sampling temperature: "raw" is before it,
            # "processed" after.
            logprobs_mode="processed_logprobs" if self.temperature_in_logprobs else "raw_logprobs",
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        if on_cpu:
            # A prompt split over two batches rewinds its seed's generator, which CPU generators
            # cannot do: hence no chunked prefill, and room for the longest prompt in one batch.
            options |= dict(
                enforce_eager=True,
                enable_chunked_prefill=False,
                max_num_batched_tokens=max(8192, max_length),
            )
        else:
            options |= dict(
                gpu_memory_utilization=rollout.gpu_memory_utilization,
                enable_sleep_mode=self.can_sleep,
            )
        try:
            self.llm = LLM(**options)
        except Exception as error:
            raise ModelError(f"vllm cannot load {path}: {_last_line(error)}") from error
        self.vocab: int | None = None  # what sampling was last limited to

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        continues: bool = False,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Trajectory]:
        """One trajectory per request, in their order. Log-probs are at `rollout.temperature`; where
        that is not 1 and top-k or top-p truncate, vLLM can only give them renormalised over what is
        left. `continues` keeps the cached prefixes of the call before, which the prompts go on
        from. `on_finished` is told how many completions are finished since it was last."""
        if not continues:  # what is cached must not depend on what was drawn before a resume
            self.llm.reset_prefix_cache()
        if sampling.vocab != self.vocab:
            self.llm.collective_rpc(
                lambda worker: _limit_vocabulary(worker.model_runner.model, sampling.vocab)
            )
            self.vocab = sampling.vocab
        params = [
            self.sampling_params(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                stop_token_ids=list(sampling.stop_ids),
                ignore_eos=True,
                seed=r.seed,
                logprobs=0,
                detokenize=False,
            )
            for r in requests
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(r.prompt_ids)} for r in requests],
            params,
            use_tqdm=False if on_finished is None else partial(_count, on_finished),
        )
        trajectories = []
        for request, output in zip(requests, outputs):
            completion = output.outputs[0]
            ids = list(completion.token_ids)
            logprobs = np.array(
                [entry[token].logprob for entry, token in zip(completion.logprobs, ids)], np.float32
            )
            trajectories.append(
                Trajectory(
                    request.prompt_index,
                    request.sample_index,
                    list(request.prompt_ids),
                    ids,
                    completion.finish_reason,
                    logprobs,
                )
            )
        return trajectories

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the trainer's tensors in place; `weights` is consumed lazily, so it may gather as it
        goes."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()

    def fingerprints(self, names: Sequence[str], salt: int) -> dict[str, int | None]:
        """The fingerprint of each named tensor as the engine computes with it; None where it holds
        none."""
        return self.llm.collective_rpc(
            lambda worker: _fingerprints(worker.model_runner.model, names, salt)
        )[0]

    def sleep(self) -> None:
        """Free the weights and the KV cache; `wake` must be followed by a weight sync."""
        if self.can_sleep:
            self.llm.sleep(level=2)

    def wake(self) -> None:
        """Take the memory back. The weights are undefined until `load_weights`."""
        if self.can_sleep:
            self.llm.wake_up()

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm


def interpret_small_functions() -> None:
    """Keep vLLM from compiling its small helpers on a CPU, in which a first call would run a C++
    compiler.

    They are decorated with torch.compile while vllm is imported, whatever `enforce_eager` says; the
    one that every request meets ranks the sampled token's log-prob."""
    from vllm.platforms import current_platform

    current_platform.simple_compile_backend = "eager"


def _limit_vocabulary(model: torch.nn.Module, vocab: int | None) -> None:
    """Cut the logits to the ids below `vocab`, where vLLM cuts off what it padded the head with
    itself."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    for module in model.modules():
        if isinstance(module, LogitsProcessor):
            module.org_vocab_size = min(vocab or module.vocab_size, module.vocab_size)


@torch.no_grad()
def _fingerprints(model: torch.nn.Module, names: Sequence[str], salt: int) -> dict[str, int | None]:
    modules = dict(model.named_modules())
    found: dict[str, int | None] = {}
    for name in names:
        path, _, kind = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        fused, part = FUSED.get(leaf, (leaf, None))
        module = modules.get(path) if path in modules else modules.get(f"{parent}.{fused}")
        if path in modules:
            part = None
        tensor = getattr(module, kind, None)
        if tensor is None:
            found[name] = None
            continue
        rows = slice(None)
        if part is not None:
            sizes = module.output_sizes
            rows = slice(sum(sizes[:part]), sum(sizes[: part + 1]))
        elif hasattr(module, "org_vocab_size"):
            rows = slice(0, module.org_vocab_size)  # vLLM pads the vocabulary
        if tensor.dim() == 2 or tensor.numel() == 0:
            found[name] = _matrix_fingerprint(module, tensor, rows, name, salt)
        else:
            found[name] = checksum(tensor[rows])
    return found


def _matrix_fingerprint(
    module, weight: torch.Tensor, rows: slice, name: str, salt: int
) -> int | None:
    """Sampled columns of the matrix the module multiplies with: read, or recovered with one-hot
    inputs.

    One-hot inputs recover a packed matrix exactly, as every other product is a zero. Where both the
    plain and a packed copy exist, as for a head, they must agree; None is returned if they do not.
    """
    width = weight.shape[1] if weight.dim() == 2 else module.input_size
    columns = sampled_columns(name, width, salt)
    readings = []
    if weight.numel():
        readings.append(weight[rows][:, columns.to(weight.device)])
    if hasattr(module, "cpu_linear"):
        probe = torch.zeros(
            len(columns),
            width,
            dtype=module.params_dtype if hasattr(module, "params_dtype") else weight.dtype,
        )
        probe[torch.arange(len(columns)), columns] = 1
        readings.append(module.cpu_linear(probe, weight, None).t()[rows])
    sums = {checksum(reading) for reading in readings}
    return sums.pop() if len(sums) == 1 else None


def _count(on_finished: Callable[[int], None], requests: Iterable | None = None, **_):
    """What vLLM makes in place of tqdm: the requests as they are while it adds them, then a counter
    of finished ones."""
    return _Finished(on_finished) if requests is None else requests


class _Finished:
    """Stands where vLLM puts its progress bar, and passes on what it counts."""

    def __init__(self, on_finished: Callable[[int], None]):
        self.on_finished, self.n, self.postfix = on_finished, 0, ""
        self.started = time.monotonic()

    @property
    def format_dict(self) -> dict[str, float]:
        return {"elapsed": max(time.monotonic() - self.started, 1e-6)}  # vLLM divides by it

    def update(self, count: int) -> None:
        self.n += count
        self.on_finished(count)

    def refresh(self) -> None:
        """Nothing is drawn."""

    close = refresh


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
