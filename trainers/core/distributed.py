"""Ranks: the process group, and the few collectives on Python values that the loop needs."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainers.core import peers, watchdog


def setup(timeout: float = 240.0) -> torch.device:
    """Join the process group, and return this rank's device.

    Without torchrun it is a group of one rank, whose variables are written to the environment.

    Args:
        timeout: of a collective, minutes (`deadline.collective`).
    """
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # DeepSpeed takes a group that is there; its own would have another timeout.
    if not dist.is_initialized():
        # One rank alone meets nobody, so it needs no port that another process can have taken.
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.HashStore() if world_size() == 1 else None,
            rank=rank(),
            world_size=world_size(),
            timeout=timedelta(minutes=timeout),
        )
        forget_groups()
        dog = watchdog.active()
        if dog is not None and world_size() > 1:
            peers.connect(dog, rank(), world_size())
    return device


def forget_groups() -> None:
    """Drop DeepSpeed's groups of a process group that is gone, as where vLLM ended in this one."""
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        groups._release_process_group_references()


def setup_if_several() -> None:
    """Join the process group under torchrun; one rank alone needs none to agree with itself."""
    if world_size() > 1:
        setup()


def rank() -> int:
    """This process's number, 0, 1, …; torchrun's before the group is set up."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of ranks; torchrun's before the group is set up."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def barrier() -> None:
    """Wait for all ranks. A collective."""
    if dist.is_initialized():
        with watchdog.waiting("barrier"):
            dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. A collective.

    Args:
        value: any object that pickles.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with watchdog.waiting("gather"):
        dist.all_gather_object(values, value)
    return values


def shard_contiguous(items: list) -> list:
    """This rank's contiguous part of a list that every rank holds."""
    ranks, mine = world_size(), rank()
    start, end = (len(items) * r // ranks for r in (mine, mine + 1))
    return items[start:end]
