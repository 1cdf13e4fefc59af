"""The vLLM rollout engine, in the trainer's own process: one engine per rank, weights in place.

vLLM's layers differ from the checkpoint's. Query, key and value are one matrix, gate and up are
another. On a CPU each matrix is repacked for oneDNN after loading, and experts are for their own
kernel. `fingerprints` reads them back exactly all the same. So a tensor that did not arrive, or a
stale packed copy of one that did, is named instead of sampled from.
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
# Matrices of all experts together: name in transformers -> name in vLLM.
EXPERTS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
# Matrices that the checkpoint holds as [in, out], by the model's type.
TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc")}
# Models whose window vLLM 0.32 makes one token wider than transformers does.
WIDER_WINDOW = ("cohere2",)
HEAD = "lm_head"  # the module, in transformers and in vLLM


class VllmEngine:
    """Samples completions with vLLM.

    Every request has a seed of its own. So the noise of a completion does not depend on the batch.
    The logits may, in the last bits (docs/design.md, "Reproducible samples"). With
    `rollout.seeded=false` the noise comes from vLLM's own generator.
    """

    # The key that selects it, for messages.
    setting = "rollout.engine"
    # Of vLLM's sleep: 2 drops the weights, 1 keeps them on the CPU.
    sleep_level = 2

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

            keep_transformers_classes()
        except ImportError as error:
            raise ConfigError(
                f"{self.setting}=vllm, but vllm does not import here ({error}); "
                f"install it, or use {self.setting}=hf"
            ) from error
        self.sampling_params = SamplingParams
        self.can_sleep = rollout.sleep and not on_cpu
        self.seeded = rollout.seeded
        # Without their names torch would start every GPU of the machine to read its generator.
        self.generators = [] if on_cpu else [torch.cuda.current_device()]
        # The number of ids that sampling is limited to, and those among them that it leaves out.
        self.vocabulary: tuple[int | None, tuple[int, ...]] = (None, ())
        options = common_options(path, config, dtype, max_length)
        options |= cpu_options(max_length) if on_cpu else gpu_options(rollout, self.can_sleep)
        try:
            self.llm = LLM(**options | self.own_options())
        except Exception as error:
            raise ModelError(f"vllm cannot load {path}: {last_line(error)}") from error

    def own_options(self) -> dict:
        """What an engine of another use sets otherwise."""
        return {}

    @classmethod
    def check_model(cls, path: str, config, max_length: int) -> None:
        """Refuse a model that vLLM computes otherwise than transformers.

        Args:
            path: the model's, for the message.
            config: the model's.
            max_length: the longest sequence, in tokens.

        Raises:
            ModelError: it says what differs.
        """
        window = getattr(config, "sliding_window", None)
        if config.model_type in WIDER_WINDOW and window and max_length > window:
            raise ModelError(
                f"{cls.setting}=vllm: in vLLM a token of {path} sees one token more than its "
                f"window of {window} in transformers; use {cls.setting}=hf, or sequences of up to "
                f"{window} tokens (they have {max_length})"
            )

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
        self.limit_vocabulary(sampling.vocab, sampling.missing)
        # vLLM draws from torch's own generator too, even where each request has a seed. That one is
        # the trainer's: its dropout must not depend on what was sampled before a resume.
        with torch.random.fork_rng(self.generators, enabled=self.seeded):
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
            seed=request.seed if self.seeded else None,
            logprobs=0,
            detokenize=False,
        )

    def limit_vocabulary(self, vocab: int | None, missing: tuple[int, ...]) -> None:
        """Give a probability to the ids of the tokenizer alone.

        Args:
            vocab: ids below it have one; None: all.
            missing: ids below it that have none.
        """
        vocabulary = vocab, missing
        if vocabulary != self.vocabulary:
            self.llm.collective_rpc(
                lambda worker: _limit_logits(worker.model_runner.model, *vocabulary)
            )
            self.vocabulary = vocabulary

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take the trainer's tensors in place.

        `weights` is consumed lazily, so it may gather as it goes.
        """
        self.llm.collective_rpc(_load, args=(weights,))
        self.llm.reset_prefix_cache()

    def fingerprints(self, names: Sequence[str], salt: int) -> dict[str, int | None]:
        """The fingerprint of each named tensor as the engine computes with it.

        None stands for a tensor that the engine does not hold, or whose copies disagree.
        """

        def read(worker) -> dict[str, int | None]:
            model = worker.model_runner.model
            modules = dict(model.named_modules())
            transposed = TRANSPOSED.get(getattr(model.config, "model_type", ""), ())
            return {name: _fingerprint(modules, name, salt, transposed) for name in names}

        return self.llm.collective_rpc(read)[0]

    def sleep(self) -> None:
        """Free the weights and the KV cache; `wake` must be followed by a weight sync."""
        if self.can_sleep:
            self.llm.sleep(level=self.sleep_level)

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


def common_options(path: str, config, dtype: torch.dtype, max_length: int) -> dict:
    """vLLM's options on any device; `config` is the run's."""
    rollout = config.rollout
    return {
        "model": model_folder(path),
        "trust_remote_code": config.model.trust_remote_code,
        "dtype": str(dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,
        # Without seeds of their own, the samples of different ranks must differ.
        "seed": 0 if rollout.seeded else (config.seed + rank()) % 2**31,
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


def rank() -> int:
    """This process's place among those of a distributed run, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


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


def keep_transformers_classes() -> None:
    """Keep vLLM from changing classes of transformers.

    Models that vLLM has no code of its own for run as those of transformers. vLLM marks their class
    for torch.compile, in place. The trainer's model and the teacher are of that class too, and
    could not run any more. Without the mark vLLM does not compile such models.
    """
    from vllm.model_executor.models.transformers.base import Base

    Base._decorate_for_torch_compile = lambda self: None


def _load(worker, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Take the trainer's tensors in place, in a worker of vLLM."""
    model = worker.model_runner.model
    if not hasattr(model, HEAD):
        # It computes logits with the embeddings, and knows no head.
        weights = (pair for pair in weights if not pair[0].startswith(f"{HEAD}."))
    worker.reload_weights(weights_iterator=weights)
    for module in model.modules():
        if (experts := _packed_experts(module)) is not None:
            # vLLM 0.32 packs experts when it first loads them, but not when it loads them again.
            experts.process_weights_after_loading(module)


def _packed_experts(module: torch.nn.Module):
    """vLLM's kernel of a layer of experts, where it is one that packs them on a CPU; or None."""
    kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    return experts if hasattr(experts, "isa") else None


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
def _fingerprint(
    modules: dict[str, torch.nn.Module], name: str, salt: int, transposed: Sequence[str] = ()
) -> int | None:
    """The fingerprint of one checkpoint tensor, from the module of vLLM that computes with it.

    Args:
        modules: vLLM's, by name.
        name: of the tensor.
        salt: decides which columns are compared.
        transposed: modules whose matrices the checkpoint holds as [in, out].
    """
    path, _, kind = name.rpartition(".")
    if path.endswith(".experts") and kind in EXPERTS:
        return _experts_fingerprint(modules.get(f"{path}.routed_experts"), EXPERTS[kind])
    module, part = modules.get(path), None
    parent, _, leaf = path.rpartition(".")
    if module is None and path == HEAD:
        module = _embeddings(modules)
    elif module is None:
        fused, part = FUSED.get(leaf, (leaf, None))
        module = modules.get(f"{parent}.{fused}")
    tensor = getattr(module, kind, None)
    if tensor is None:
        return None
    rows = _output_rows(module, part)
    if tensor.dim() == 2 or tensor.numel() == 0:
        return _matrix_fingerprint(module, tensor, rows, name, salt, leaf in transposed)
    return checksum(tensor[rows])


def _embeddings(modules: dict[str, torch.nn.Module]) -> torch.nn.Module | None:
    """The input embeddings, which are a tied head too."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return next((m for m in modules.values() if isinstance(m, VocabParallelEmbedding)), None)


def _experts_fingerprint(module: torch.nn.Module | None, name: str) -> int | None:
    """The fingerprint of all experts' matrices [E, out, in].

    On a CPU they are packed, which only moves numbers. So packing their places tells where each is.
    """
    tensor = getattr(module, name, None)
    if tensor is None:
        return None
    experts = _packed_experts(module)
    if experts is not None:
        places = _packed_places(tensor, experts.isa)
        tensor = torch.empty_like(tensor).flatten().scatter_(0, places, tensor.flatten())
    return checksum(tensor)


def _packed_places(tensor: Tensor, isa: str) -> Tensor:
    """Where each number of a packed tensor was before, as places in the flat tensor."""
    from vllm import _custom_ops

    bits = torch.int32 if tensor.element_size() == 4 else torch.int16
    size = 2 ** (8 * tensor.element_size())
    places = torch.arange(tensor.numel())
    packed = 0
    # Sixteen bits cannot count far: the digits of a place are packed one after the other.
    for digit in range(1 if bits is torch.int32 else 2):
        digits = (places // size**digit % size).to(bits).view(tensor.dtype).view(tensor.shape)
        moved = _custom_ops.cpu_prepack_moe_weight(digits, isa).view(bits).flatten()
        packed = packed + moved.long() % size * size**digit
    return packed


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


def _matrix_fingerprint(
    module, weight: Tensor, rows: slice, name: str, salt: int, transposed: bool
) -> int | None:
    """The fingerprint of sampled columns of the matrix that the module multiplies with.

    The columns are read, or recovered with one-hot inputs. One-hot inputs recover a packed matrix
    exactly, as every other product is a zero. Where both the plain and a packed copy exist, as for
    a head, they must agree. None is returned if they do not.

    The columns of a matrix that the checkpoint holds transposed are rows here.
    """
    width = weight.shape[1] if weight.dim() == 2 else module.input_size
    columns = torch.arange(width) if transposed else sampled_columns(name, width, salt)
    readings = []
    if weight.numel():
        readings.append(weight[rows][:, columns.to(weight.device)])
    if hasattr(module, "cpu_linear"):
        dtype = getattr(module, "params_dtype", weight.dtype)
        one_hot = torch.zeros(len(columns), width, dtype=dtype)
        one_hot[torch.arange(len(columns)), columns] = 1
        readings.append(module.cpu_linear(one_hot, weight, None).t()[rows])
    if transposed:
        readings = [r[sampled_columns(name, len(r), salt).to(r.device)].t() for r in readings]
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


def last_line(error: Exception) -> str:
    """The last line of an error's message, or its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
