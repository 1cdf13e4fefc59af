"""The policy under DeepSpeed ZeRO: gradients of micro-batches, the step, weights and state."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainers.core import lora, operators, state
from trainers.core.distributed import gather, rank, world_size
from trainers.core.policy import Policy

# The end of the name of a weight whose layer has an adapter.
ADAPTED_WEIGHT = f"{lora.BASE}.weight"
# Elements gathered at once under ZeRO-3 when weights are read out.
GATHER_BUCKET = 64 * 2**20
# Gradients that are reduced at once, in elements: DeepSpeed's default.
REDUCE_BUCKET = 500_000_000


def settings(config, count: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run that trains so many numbers."""
    train, zero = config.train, config.engine
    bf16 = config.model.dtype == "bfloat16"
    stage: dict[str, Any] = {"stage": zero.zero_stage}
    # A GPU takes memory for the whole bucket, up to 2 GB, also where an adapter fills little.
    stage["reduce_bucket_size"] = min(REDUCE_BUCKET, count)
    if zero.offload_optimizer:
        stage["offload_optimizer"] = {"device": "cpu"}
    if zero.offload_params:
        stage["offload_param"] = {"device": "cpu"}
    if zero.zero_stage == 3:
        # Small tensors stay whole on every rank.
        stage |= {"stage3_param_persistence_threshold": 10_000, "overlap_comm": False}
    options = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": float(train.max_grad_norm),
        "zero_optimization": stage,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    # DeepSpeed's stage 0 refuses this key.
    if bf16 and zero.zero_stage > 0:
        options["data_types"] = {"grad_accum_dtype": "fp32"}
    return options


def make_optimizer(policy: Policy, config) -> torch.optim.Optimizer:
    """AdamW over the parameters that learn; DeepSpeed's CPUAdam where its state is offloaded."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    options = adam_options(config)
    if not config.engine.offload_optimizer:
        return torch.optim.AdamW(parameters, **options)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return operators.compile_once(
        "cpu_adam", lambda: DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
    )


def adam_options(config) -> dict[str, Any]:
    """AdamW's options, by the names that a group of parameters has for them."""
    train = config.train
    return {
        "lr": train.lr,
        "betas": tuple(train.betas),
        "eps": train.eps,
        "weight_decay": train.weight_decay,
    }


class PolicyEngine:
    """Wraps DeepSpeed so that the gradient of a step is the sum of what was passed to `backward`.

    DeepSpeed averages over ranks and over accumulation steps. Both are undone here. So a loss that
    is divided by a global token count gives the same gradient for any number of ranks and
    micro-batches.

    Args:
        policy: on the device, in the dtype that it trains in.
        config: the run's.
        device: this rank's.
    """

    def __init__(self, policy: Policy, config):
        import deepspeed

        operators.disable_unused()
        for name in ("DeepSpeed", "deepspeed"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="deepspeed")
        self.config, self.policy = config, policy
        # By name, empty without LoRA.
        self.adapted = lora.adapted_layers(policy.model)
        self.bf16 = config.model.dtype == "bfloat16"
        self.dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.sharded = config.engine.zero_stage == 3
        policy.start_training(config.model.dropout, config.model.gradient_checkpointing)
        self._set_dropout(True)
        count = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        self.engine, _, _, _ = deepspeed.initialize(
            model=policy, optimizer=make_optimizer(policy, config), config=settings(config, count)
        )

    def forward(self, batch, function):
        """Run `function(head, hidden [T, H], batch)` on a micro-batch, with gradients."""
        return self.engine(batch, function)

    @torch.no_grad()
    def score(self, batch, function, adapters: bool = True):
        """The same without gradients and without dropout.

        Args:
            adapters: false: without LoRA's adapters.
        """
        off = contextlib.nullcontext() if adapters else lora.without_adapters(self.policy.model)
        self._set_dropout(False)
        try:
            with off:
                return self.engine(batch, function)
        finally:
            self._set_dropout(True)

    def _set_dropout(self, on: bool) -> None:
        """Switch the dropout that updates have: the model's own, if it is kept, and LoRA's."""
        if self.config.model.dropout:
            self.policy.train(on)
        for layer in self.adapted.values():
            layer.lora_dropout.train(on)
            # DoRA reads this one too.
            layer.training = on

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of `loss` to the step's. A collective.

        Args:
            loss: a scalar, divided by the global token count.
            last: `step` follows.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        # The gradient of a loss that is not finite may be finite. Of NaN all ranks learn.
        scale = world_size() if math.isfinite(loss.detach()) else math.nan
        self.engine.backward(loss * scale, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Clip, update, clear the gradients. A collective.

        A gradient that is not finite is cleared alone: the weights and the optimizer's state stay
        as they are.

        Returns:
            the gradient's global 2-norm before clipping; infinite where the update was skipped.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        # Without ZeRO, DeepSpeed computes no norm in float32.
        if self.config.engine.zero_stage == 0 and not self.bf16:
            norm = self._gradient_norm()
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return math.inf
            self.engine.step()
            return norm
        self.engine.step()
        if self.engine.optimizer.overflow:
            return math.inf
        return float(self.engine.get_global_grad_norm())

    def _gradient_norm(self) -> float:
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter whole, under its name in transformers, in the compute dtype.

        Under ZeRO-3 this is a collective that all ranks must walk through together, a bucket at a
        time. A tied head comes a second time under its own name. vLLM keeps a packed copy of it,
        which goes stale otherwise. LoRA's adapters are merged into the weights of their layers.
        """
        seen: set[int] = set()
        bucket: list[tuple[str, torch.nn.Parameter]] = []
        size, head = 0, self._head_name()
        for name, parameter in self.policy.model.named_parameters(remove_duplicate=False):
            if lora.is_adapter(name):
                continue
            if id(parameter) in seen and not name.startswith(f"{head}."):
                continue
            seen.add(id(parameter))
            bucket.append((name, parameter))
            # Under ZeRO-3 a parameter's own count is that of this rank's part.
            size += getattr(parameter, "ds_numel", parameter.numel())
            if size >= GATHER_BUCKET:
                yield from self._gathered(bucket)
                bucket, size = [], 0
        yield from self._gathered(bucket)

    def is_finite(self) -> bool:
        """Whether every weight is a finite number. A collective."""
        finite = [bool(tensor.isfinite().all()) for _, tensor in self.weights()]
        return all(gather(all(finite)))

    def _head_name(self) -> str:
        """The name of the head's module."""
        model = self.policy.model
        head = model.get_output_embeddings()
        return next(name for name, module in model.named_modules() if module is head)

    def _gathered(
        self, bucket: list[tuple[str, torch.nn.Parameter]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole parameters of a bucket, gathered together. A collective under ZeRO-3."""
        import deepspeed

        if not bucket:
            return
        parameters = [parameter for _, parameter in bucket]
        layers = [self.adapted.get(name.removesuffix(ADAPTED_WEIGHT)) for name, _ in bucket]
        for layer in filter(None, layers):
            parameters += lora.adapter_parameters(layer)
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.sharded):
            for (name, parameter), layer in zip(bucket, layers):
                tensor = parameter.detach() if layer is None else lora.merged_weight(layer)
                yield name.replace(lora.BASE, ""), tensor.to(self.dtype)

    def save_model(self, folder: Path, tokenizer, stop_ids: list[int]) -> None:
        """Write a Hugging Face folder that transformers and vLLM load as it is.

        A collective under ZeRO-3.

        Args:
            folder: a new one.
            tokenizer: goes into it.
            stop_ids: the end tokens that its generation config names.
        """
        tensors = {}
        for name, tensor in self.weights():
            if rank() == 0:
                tensors[name] = tensor.to("cpu", copy=True)
        if rank() == 0:
            model = self.policy.model
            model.generation_config.eos_token_id = list(stop_ids)
            if model.config.tie_word_embeddings:
                # The embeddings' own entry holds a tied head.
                tensors.pop(f"{self._head_name()}.weight", None)
            model.save_pretrained(folder, state_dict=tensors)
            tokenizer.save_pretrained(folder)

    def save_adapters(self, folder: Path, base: str) -> None:
        """Write LoRA's adapters as a folder that peft and vLLM load. A collective under ZeRO-3.

        Args:
            folder: a new one.
            base: the model that they belong to, a folder or hub name.
        """
        import deepspeed

        model, tensors = self.policy.model, {}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with deepspeed.zero.GatheredParameters(list(trained.values()), enabled=self.sharded):
            if rank() == 0:
                tensors = {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}
        if rank() == 0:
            lora.save_adapters(folder, model, tensors, base)

    def save_state(self, folder: Path) -> list[Path]:
        """Write this rank's part of the parameters that learn and of AdamW's moments.

        Args:
            folder: an existing one.

        Returns:
            the files.
        """
        whole = self.config.engine.zero_stage == 0
        return state.save(folder, self.policy, self.engine.optimizer, whole)

    def load_state(self, folder: Path) -> None:
        """Read what the ranks of a run wrote with `save_state`. A collective.

        AdamW's options stay those of the config.
        """
        state.load(folder, self.policy, self.engine.optimizer)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self.engine.destroy()
