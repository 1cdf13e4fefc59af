"""Ranks: set up the process group, and the few collectives on Python values that the loop needs."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# of a collective; ranks may be far apart after an evaluation of long completions
TIMEOUT = timedelta(hours=4)


def setup() -> torch.device:
    """Join the process group (one rank without torchrun) and return this rank's device."""
    cuda = torch.cuda.is_available()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():  # by us, not by DeepSpeed, which takes a group that is there
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return (
        dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    )


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def shard_contiguous(items: list) -> list:
    """This rank's contiguous part of a list that every rank holds."""
    bounds = [len(items) * r // world_size() for r in range(world_size() + 1)]
    return items[bounds[rank()] : bounds[rank() + 1]]
