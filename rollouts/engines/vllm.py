"""The vLLM rollout engine, in the trainer's own process: one engine per rank, weights in place.

vLLM's layers differ from the checkpoint's. Query, key and value are one matrix, gate and up are
another. On a CPU each matrix is repacked for oneDNN after loading. `fingerprints` reads them back
exactly all the same. So a tensor that did not arrive, or a stale packed copy of one that did, is
named instead of sampled from.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

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
    """Samples completions with vLLM.

    Every request has a seed of its own. So the noise of a completion does not depend on the batch.
    The logits may, in the last bits (docs/design.md, "Reproducible samples").
    """

    def __init__(
        self, path: str, config, device: torch.device, dtype: torch.dtype, max_length: int, **_
    ):
        rollout = config.rollout
        on_cpu = device.type == "cpu"
        prepare_import(on_cpu, rollout.cpu_kv_cache_gib)
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
        self.can_sleep = rollout.sleep and not on_cpu
        # The number of ids that sampling is limited to, and those among them that it leaves out.
        self.vocabulary: tuple[int | None, tuple[int, ...]] = (None, ())
        options = common_options(path, rollout, dtype, max_length)
        options |= cpu_options(max_length) if on_cpu else gpu_options(rollout, self.can_sleep)
        try:
            self.llm = LLM(**options)
        except Exception as error:
            raise ModelError(f"vllm cannot load {path}: {_last_line(error)}") from error

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        continues: bool = False,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Trajectory]:
        """Draw one trajectory per request, in their order (rollouts/engines/base.py).

        Log-probs are at `rollout.temperature`. Where that is not 1 and top-k or top-p truncate,
        vLLM can only give them renormalised over what is left.
        """
        if not continues:
            # What is cached must not depend on what was drawn before a resume.
            self.llm.reset_prefix_cache()
        self._limit_vocabulary(sampling)
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(request.prompt_ids)} for request in requests],
            [self._params(request, sampling) for request in requests],
            use_tqdm=False if on_finished is None else partial(_count, on_finished),
        )
        return [_trajectory(*pair) for pair in zip(requests, outputs)]

    def _params(self, request: Request, sampling: Sampling):
        """vLLM's SamplingParams of one request."""
        return self.sampling_params(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_token_ids=list(sampling.stop_ids),
            ignore_eos=True,
            seed=request.seed,
            logprobs=0,
            detokenize=False,
        )

    def _limit_vocabulary(self, sampling: Sampling) -> None:
        """Let only the ids of the tokenizer be sampled."""
        vocabulary = sampling.vocab, sampling.missing
        if vocabulary != self.vocabulary:
            self.llm.collective_rpc(
                lambda worker: _limit_logits(worker.model_runner.model, *vocabulary)
            )
            self.vocabulary = vocabulary

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take the trainer's tensors in place.

        `weights` is consumed lazily, so it may gather as it goes.
        """
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()

    def fingerprints(self, names: Sequence[str], salt: int) -> dict[str, int | None]:
        """The fingerprint of each named tensor as the engine computes with it.

        None stands for a tensor that the engine does not hold, or whose copies disagree.
        """

        def read(worker) -> dict[str, int | None]:
            modules = dict(worker.model_runner.model.named_modules())
            return {name: _fingerprint(modules, name, salt) for name in names}

        return self.llm.collective_rpc(read)[0]

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


def prepare_import(on_cpu: bool, kv_cache_gib: float) -> None:
    """Set what vLLM reads from the environment while it is imported."""
    # In-process, and quiet.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vLLM remarks on Triton before it reads its own logging level.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    if on_cpu:
        # Thread binding would pin the trainer's threads too, and every rank's to the same cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # vLLM 0.32 reads whole GiB here.
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(kv_cache_gib)))


def common_options(path: str, rollout, dtype: torch.dtype, max_length: int) -> dict:
    """vLLM's options on any device; `rollout` is that section of the config."""
    return {
        "model": model_folder(path),
        "dtype": str(dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,
        "seed": 0,
        "max_model_len": max_length,
        "max_num_seqs": rollout.batch_size,
        "enable_prefix_caching": True,
        # The sampled token's log-prob at the sampling temperature. "raw" is before the temperature,
        # "processed" is after it.
        "logprobs_mode": "raw_logprobs" if rollout.temperature == 1 else "processed_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }


def cpu_options(max_length: int) -> dict:
    """vLLM's options on a CPU."""
    return {
        "distributed_executor_backend": "uni",
        "enforce_eager": True,
        # A prompt split over two batches rewinds the generator of its seed, which CPU generators
        # cannot do. Hence no chunked prefill, and room for the longest prompt in one batch.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, max_length),
    }


def gpu_options(rollout, can_sleep: bool) -> dict:
    """vLLM's options on a GPU; `rollout` is that section of the config."""
    distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return {
        # `external_launcher` takes the GPU of this rank.
        "distributed_executor_backend": "external_launcher" if distributed else "uni",
        "gpu_memory_utilization": rollout.gpu_memory_utilization,
        "enable_sleep_mode": can_sleep,
    }


def interpret_small_functions() -> None:
    """Keep vLLM from compiling its small helpers on a CPU.

    They are decorated with torch.compile while vllm is imported, whatever `enforce_eager` says. The
    first call of one would run a C++ compiler. Every request meets the helper that ranks the
    sampled token's log-prob.
    """
    from vllm.platforms import current_platform

    current_platform.simple_compile_backend = "eager"


def _trajectory(request: Request, output) -> Trajectory:
    """The trajectory of one request, from vLLM's RequestOutput."""
    completion = output.outputs[0]
    ids = list(completion.token_ids)
    logprobs = [entry[token].logprob for entry, token in zip(completion.logprobs, ids)]
    return Trajectory(
        request.prompt_index,
        request.sample_index,
        list(request.prompt_ids),
        ids,
        completion.finish_reason,
        np.array(logprobs, np.float32),
    )


def _limit_logits(model: torch.nn.Module, vocab: int | None, missing: tuple[int, ...]) -> None:
    """Cut the logits to the ids below `vocab`, and set those of `missing` ids to -inf.

    The cut is where vLLM cuts off its own padding of the head.
    """
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    def forbid(module, inputs, logits):
        # Only the first rank of a tensor-parallel group has the logits.
        if logits is None or not missing:
            return logits
        return logits.index_fill(-1, torch.tensor(missing, device=logits.device), -torch.inf)

    for module in model.modules():
        if isinstance(module, LogitsProcessor):
            module.org_vocab_size = min(vocab or module.vocab_size, module.vocab_size)
            module._forward_hooks.clear()
            module.register_forward_hook(forbid)


@torch.no_grad()
def _fingerprint(modules: dict[str, torch.nn.Module], name: str, salt: int) -> int | None:
    """The fingerprint of one checkpoint tensor, from the module of vLLM that computes with it."""
    path, _, kind = name.rpartition(".")
    module, part = modules.get(path), None
    if module is None:
        parent, _, leaf = path.rpartition(".")
        fused, part = FUSED.get(leaf, (leaf, None))
        module = modules.get(f"{parent}.{fused}")
    tensor = getattr(module, kind, None)
    if tensor is None:
        return None
    rows = _output_rows(module, part)
    if tensor.dim() == 2 or tensor.numel() == 0:
        return _matrix_fingerprint(module, tensor, rows, name, salt)
    return checksum(tensor[rows])


def _output_rows(module: torch.nn.Module, part: int | None) -> slice:
    """The rows of a module's tensors that belong to one checkpoint tensor.

    Args:
        module: one of vLLM's.
        part: the position among the outputs of a fused matrix; None for any other.
    """
    if part is not None:
        sizes = module.output_sizes
        return slice(sum(sizes[:part]), sum(sizes[: part + 1]))
    if hasattr(module, "org_vocab_size"):
        # vLLM pads the vocabulary.
        return slice(0, module.org_vocab_size)
    return slice(None)


def _matrix_fingerprint(module, weight: Tensor, rows: slice, name: str, salt: int) -> int | None:
    """The fingerprint of sampled columns of the matrix that the module multiplies with.

    The columns are read, or recovered with one-hot inputs. One-hot inputs recover a packed matrix
    exactly, as every other product is a zero. Where both the plain and a packed copy exist, as for
    a head, they must agree. None is returned if they do not.
    """
    width = weight.shape[1] if weight.dim() == 2 else module.input_size
    columns = sampled_columns(name, width, salt)
    readings = []
    if weight.numel():
        readings.append(weight[rows][:, columns.to(weight.device)])
    if hasattr(module, "cpu_linear"):
        dtype = getattr(module, "params_dtype", weight.dtype)
        one_hot = torch.zeros(len(columns), width, dtype=dtype)
        one_hot[torch.arange(len(columns)), columns] = 1
        readings.append(module.cpu_linear(one_hot, weight, None).t()[rows])
    checksums = {checksum(reading) for reading in readings}
    return checksums.pop() if len(checksums) == 1 else None


def _count(on_finished: Callable[[int], None], requests: Iterable | None = None, **_):
    """What vLLM calls in place of tqdm.

    While it adds requests they are passed through. Then it gets a counter of finished ones.
    """
    return _FinishedCounter(on_finished) if requests is None else requests


class _FinishedCounter:
    """Stands where vLLM puts its progress bar, and passes on what it counts."""

    def __init__(self, on_finished: Callable[[int], None]):
        self.on_finished, self.n, self.postfix = on_finished, 0, ""
        self.started = time.monotonic()

    @property
    def format_dict(self) -> dict[str, float]:
        # vLLM divides by the elapsed time.
        return {"elapsed": max(time.monotonic() - self.started, 1e-6)}

    def update(self, count: int) -> None:
        self.n += count
        self.on_finished(count)

    def refresh(self) -> None:
        """Nothing is drawn."""

    close = refresh


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
