"""The policy under DeepSpeed ZeRO: backward over any number of micro-batches, one step, weights
out, state in and out."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Iterator

import torch

from trainers.core import operators
from trainers.core.distributed import world_size
from trainers.core.policy import Policy

GATHER_BUCKET = 64 * 2**20  # elements gathered at once under ZeRO-3 when weights are read out


class PolicyEngine:
    """Wraps DeepSpeed so that the gradient of a step is the sum of what was passed to `backward`.

    DeepSpeed averages over ranks and over accumulation steps; both are undone here, so that a loss
    that is divided by a global token count gives the same gradient for any number of ranks and
    micro-batches."""

    def __init__(self, policy: Policy, config, device: torch.device):
        import deepspeed

        operators.disable_unused()
        for name in ("DeepSpeed", "deepspeed"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="deepspeed")
        train, zero = config.train, config.engine
        if config.model.gradient_checkpointing:
            policy.model.gradient_checkpointing_enable({"use_reentrant": False})
        policy.train()
        parameters = [p for p in policy.parameters() if p.requires_grad]
        if zero.offload_optimizer:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            optimizer = operators.compile_once(
                "cpu_adam",
                lambda: DeepSpeedCPUAdam(
                    parameters,
                    lr=train.lr,
                    betas=tuple(train.betas),
                    eps=train.eps,
                    weight_decay=train.weight_decay,
                    adamw_mode=True,
                ),
            )
        else:
            optimizer = torch.optim.AdamW(
                parameters,
                lr=train.lr,
                betas=tuple(train.betas),
                eps=train.eps,
                weight_decay=train.weight_decay,
            )
        self.bf16 = config.model.dtype == "bfloat16"
        self.config = config
        self.dtype = torch.bfloat16 if self.bf16 else torch.float32
        stage: dict = {"stage": zero.zero_stage}
        if zero.offload_optimizer:
            stage["offload_optimizer"] = {"device": "cpu"}
        if zero.offload_params:
            stage["offload_param"] = {"device": "cpu"}
        if zero.zero_stage == 3:
            # Small tensors stay whole on every rank; the bucket sizes fit them to small models too.
            stage |= {"stage3_param_persistence_threshold": 10_000, "overlap_comm": False}
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": float(train.max_grad_norm),
            "zero_optimization": stage,
            "bf16": {"enabled": self.bf16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
            "wall_clock_breakdown": False,
        }
        if self.bf16 and zero.zero_stage > 0:  # DeepSpeed's stage 0 refuses it
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=policy, optimizer=optimizer, config=settings
        )
        self.policy = policy
        self.device = device

    def forward(self, batch, function):
        """Run `function(head, hidden [T, H], batch)` on a micro-batch, with gradients."""
        return self.engine(batch, function)

    @torch.no_grad()
    def score(self, batch, function):
        """The same without gradients."""
        return self.engine(batch, function)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of `loss` to the step's; `last` says that `step` follows."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * world_size(), scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """Clip, update, clear the gradients.

        Returns:
            the gradient's global 2-norm before clipping.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        norm = None
        if self.config.engine.zero_stage == 0 and not self.bf16:  # DeepSpeed computes none here
            norm = math.sqrt(
                sum(
                    float(p.grad.double().square().sum())
                    for p in self.policy.parameters()
                    if p.grad is not None
                )
            )
        self.engine.step()
        if norm is None:
            norm = float(self.engine.get_global_grad_norm())
        return norm

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter whole, under its checkpoint name, in the compute dtype; a bucket at a
        time.

        Under ZeRO-3 this is a collective that all ranks must walk through together. A tied head is
        given a second time under its own name: vLLM keeps a packed copy of it, which goes stale
        otherwise."""
        import deepspeed

        seen = {}
        bucket: list = []
        size = 0

        def flush():
            if not bucket:
                return
            with deepspeed.zero.GatheredParameters(
                [p for _, p in bucket], enabled=self.config.engine.zero_stage == 3
            ):
                for name, parameter in bucket:
                    yield name, parameter.detach().to(self.dtype)

        for name, parameter in self.policy.model.named_parameters(remove_duplicate=False):
            if id(parameter) in seen and not name.startswith("lm_head."):
                continue
            seen[id(parameter)] = name
            bucket.append((name, parameter))
            size += getattr(parameter, "ds_numel", parameter.numel())
            if size >= GATHER_BUCKET:
                yield from flush()
                bucket, size = [], 0
        yield from flush()

    def save_model(self, folder: Path, tokenizer, stop_ids: list[int]) -> None:
        """Write a Hugging Face folder that transformers and vLLM load as it is. A collective under
        ZeRO-3."""
        from trainers.core.distributed import rank

        state = {}
        for name, tensor in self.weights():
            if rank() == 0:
                state[name] = tensor.to("cpu", copy=True)
        if rank() == 0:
            model = self.policy.model
            model.generation_config.eos_token_id = list(stop_ids)
            if model.config.tie_word_embeddings:
                state.pop("lm_head.weight", None)
            model.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)

    def save_state(self, folder: Path) -> None:
        """Write parameters and optimizer state, each rank its part."""
        self.engine.save_checkpoint(str(folder), tag="state", save_latest=False)

    def load_state(self, folder: Path) -> None:
        """Read what `save_state` wrote, with the same number of ranks and the same ZeRO stage."""
        self.engine.load_checkpoint(str(folder), tag="state", load_lr_scheduler_states=False)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self.engine.destroy()
