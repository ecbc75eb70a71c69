"""Joining the process group: which process am I, on which device."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist


def local_rank() -> int:
    """This process's number on its host, 0 when nothing launched it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def pick_device() -> torch.device:
    """The GPU of this process's local rank, or the CPU when there is none or DS_ACCELERATOR=cpu asks for it."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def join(timeout_seconds: float = 600) -> torch.device:
    """Join the process group that a launcher described in the environment; alone, make a group of one.

    Returns the device of this process. The backend is NCCL on GPUs and Gloo on CPUs.
    """
    device = pick_device()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(alone)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds))
    return device


@cache
def control_group() -> dist.ProcessGroup:
    """A Gloo group of all processes for the small messages of the loop, which must not wait for a GPU's queue."""
    return dist.new_group(backend="gloo")
