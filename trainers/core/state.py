"""The optimizer's state in a checkpoint: float32 weights and AdamW's moments, by parameter.

Each rank writes the parts of parameters that its optimizer holds, as tensors of .safetensors files.
At a resume each rank reads the parts that it holds then. So the number of ranks and the ZeRO stage
may differ, and no file runs code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes.errors import CheckpointError, one_line
from trainers.core.distributed import rank, world_size

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
# Bytes after which a file is full. So much is copied to the CPU at once.
FILE_BYTES = 2**30


@dataclass(frozen=True)
class Part:
    """A part of a parameter in this rank's optimizer, there a part of a larger tensor.

    Attributes:
        name: the parameter's.
        start: the first of its elements, counted row by row.
        size: the number of elements.
        total: of the whole parameter.
        owner: the optimizer's tensor, which has the moments too.
        offset: the first element in it.
    """

    name: str
    start: int
    size: int
    total: int
    owner: torch.Tensor
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part's elements [size] of `owner`, or of a moment."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.size)


def parts(policy: nn.Module, optimizer) -> Iterator[Part]:
    """The parts of all parameters that learn which this rank's optimizer holds.

    Args:
        policy: the module that DeepSpeed trains.
        optimizer: DeepSpeed's, or AdamW itself.
    """
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            # ZeRO-3: each rank has as much of a parameter, and the last ones have padding.
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank() * parameter.partition_numel()
            size = min(parameter.partition_numel(), parameter.ds_numel - start)
            owner = optimizer.fp32_partitioned_groups_flat[group]
            if size > 0:
                yield Part(name, start, size, parameter.ds_numel, owner, offset)
        elif hasattr(parameter, "_hp_mapping"):
            # ZeRO-1 and 2: all parameters lie end to end, and each rank has a stretch of that.
            if (mapping := parameter._hp_mapping) is not None:
                owner = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
                place, offset = mapping.lp_fragment_address, mapping.hp_fragment_address.start
                yield Part(name, place.start, place.numel, parameter.numel(), owner, offset)
        else:
            size = parameter.numel()
            yield Part(name, 0, size, size, parameter, 0)


def save(folder: Path, policy: nn.Module, optimizer, whole: bool) -> list[Path]:
    """Write this rank's parts.

    Args:
        folder: an existing one.
        policy: the module that DeepSpeed trains.
        optimizer: DeepSpeed's, or AdamW itself.
        whole: each rank holds everything, so they share the writing.

    Returns:
        the files.
    """
    from safetensors.torch import save_file

    own = list(parts(policy, optimizer))
    files: list[Path] = []
    tensors: dict[str, torch.Tensor] = {}

    def write() -> None:
        files.append(folder / f"rank_{rank()}_{len(files)}.safetensors")
        save_file(tensors, files[-1])
        tensors.clear()

    for part in own[rank() :: world_size()] if whole else own:
        state = _adam(optimizer).state.get(part.owner, {})
        found = {WEIGHT: part.owner} | {kind: state[kind] for kind in MOMENTS if kind in state}
        for kind, tensor in found.items():
            copy = part.of(tensor).to("cpu", copy=True)
            tensors[f"{kind}:{part.name}:{part.start}:{part.total}"] = copy
        if STEP in state:
            key = f"{STEP}:{part.name}:{part.start}:{part.total}"
            tensors[key] = torch.tensor([float(state[STEP])])
        if sum(tensor.nbytes for tensor in tensors.values()) >= FILE_BYTES:
            write()
    if tensors:
        write()
    return files


def load(folder: Path, policy: nn.Module, optimizer) -> None:
    """Read this rank's parts, and bring the weights that compute up to date. A collective.

    Raises:
        CheckpointError: the checkpoint has other parameters.
    """
    saved = Saved(folder)
    adam = _adam(optimizer)
    names = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    if other := sorted(names ^ saved.names):
        has = "has" if other[0] in saved.names else "lacks"
        raise CheckpointError(
            f"checkpoint {folder} {has} parameter {other[0]}, and this run "
            f"{'does not train' if has == 'has' else 'trains'} it; resume with the same model"
        )
    last = 0
    for part in parts(policy, optimizer):
        part.of(part.owner).copy_(saved.read(WEIGHT, part))
        if (step := saved.step(part)) is None:
            # It had no gradient yet.
            continue
        state = adam.state[part.owner]
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(part.owner)
            part.of(state[kind]).copy_(saved.read(kind, part))
        # All parts of a tensor that ZeRO made have had the same updates.
        step = max(step, float(state.get(STEP, 0)))
        state[STEP] = torch.tensor(step) if isinstance(adam, torch.optim.AdamW) else int(step)
        last = max(last, int(step))
    if not isinstance(adam, torch.optim.AdamW):
        _count(adam, last)
    refresh(optimizer)


def _count(adam, steps: int) -> None:
    """Let DeepSpeed's CPUAdam count the steps that were made.

    It multiplies the powers of its betas up from step to step. Computed at once, as it does after a
    jump, they are rounded otherwise, and a resume would not be exact.
    """
    group = adam.param_groups[0]
    options = [group[name] for name in ("eps", "weight_decay", "bias_correction")]
    unused = [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        adam.ds_opt_adam.adam_update(
            adam.opt_id, step, group["lr"], *group["betas"], *options, *unused
        )


class Saved:
    """The parts in a checkpoint's files, for reading.

    Args:
        folder: of the files.

    Raises:
        CheckpointError: a file has another form.
    """

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        # (start, end, total, open file, key) by kind and parameter.
        self.places: dict[tuple[str, str], list[tuple[int, int, int, Any, str]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = safe_open(path, framework="pt")
                for key in file.keys():  # noqa: SIM118
                    kind, name, start, total = key.split(":")
                    (size,) = file.get_slice(key).get_shape()
                    place = (int(start), int(start) + size, int(total), file, key)
                    self.places.setdefault((kind, name), []).append(place)
            except (SafetensorError, ValueError) as error:
                raise CheckpointError(
                    f"checkpoint file {path} cannot be read ({one_line(error)})"
                ) from error

    @property
    def names(self) -> set[str]:
        """Of the parameters."""
        return {name for _, name in self.places}

    def step(self, part: Part) -> float | None:
        """The number of updates that a parameter has had; None: it had none."""
        places = self.places.get((STEP, part.name))
        return max(float(file.get_tensor(key)) for *_, file, key in places) if places else None

    def read(self, kind: str, part: Part) -> torch.Tensor:
        """The elements [size] of a part.

        Raises:
            CheckpointError: the parameter has another size, or the files lack some elements.
        """
        values = torch.empty(part.size)
        end, filled = part.start + part.size, 0
        for first, last, total, file, key in self.places.get((kind, part.name), []):
            if total != part.total:
                raise CheckpointError(
                    f"checkpoint {self.folder} has {total} elements of {part.name}, this run's "
                    f"model has {part.total}; resume with the same model"
                )
            low, high = max(first, part.start), min(last, end)
            if low < high:
                piece = file.get_slice(key)[low - first : high - first]
                values[low - part.start : high - part.start] = piece
                filled += high - low
        if filled != part.size:
            raise CheckpointError(
                f"checkpoint {self.folder} has {filled} of {part.size} elements of {kind} of "
                f"{part.name}; copy the whole folder, or take another checkpoint"
            )
        return values


def refresh(optimizer) -> None:
    """Bring the weights that compute up to the optimizer's float32 ones. A collective."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        _refresh_sharded(optimizer)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()


def _refresh_sharded(optimizer) -> None:
    """The same under ZeRO-3, as DeepSpeed's own loading does it."""
    for group, weights in enumerate(optimizer.fp32_partitioned_groups_flat):
        computing = optimizer.fp16_partitioned_groups_flat[group]
        computing.data.copy_(weights.data)
        partitions = optimizer.fp16_partitioned_groups[group]
        for partition, updated in zip(partitions, optimizer.unflatten(computing, partitions)):
            partition.data = updated.data
    if persistent := optimizer.persistent_parameters:
        persistent[0].partition(persistent)
    optimizer.checkpoint_event_epilogue()


def _adam(optimizer) -> torch.optim.Optimizer:
    """AdamW itself; DeepSpeed's optimizers wrap it."""
    return getattr(optimizer, "optimizer", optimizer)
