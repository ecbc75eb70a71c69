"""Joining the process group: which process am I, on which device; and named tensors on their way between processes."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from parallel.plain_objects import gather_values
from parallel.rank_store import LOOPBACK, make_store


def local_rank() -> int:
    """This process's number on its host, 0 when nothing launched it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def num_local() -> int:
    """Processes on this host: torchrun and DeepSpeed's launcher have their own names for it."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return dist.get_world_size()


def pick_device() -> torch.device:
    """The GPU of this process's local rank, or the CPU when there is none or DS_ACCELERATOR=cpu asks for it."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank())
    # PyTorch would compute convolutions, and these alone, with 10 bits of mantissa: who wants speed takes bf16, and fp32 is fp32.
    torch.backends.cudnn.allow_tf32 = False
    # Sizes are fixed, so cuDNN may try its algorithms once. Which one wins may differ from run to run: --deterministic does without.
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    return torch.device("cuda", local_rank())


def init_process_group(timeout_seconds: float = 600) -> torch.device:
    """Join the process group that a launcher described in the environment; alone, make a group of one.

    Returns the device of this process. The backend is NCCL on GPUs and Gloo on CPUs. Where all processes are on this machine
    (they meet at a loopback address), nobody outside it can connect to any of them.
    """
    device = pick_device()
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    if not dist.is_initialized():
        limit = timedelta(seconds=timeout_seconds)
        if os.environ["MASTER_ADDR"] in LOOPBACK:
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, "lo")
        store = make_store(limit)
        numbers = dict(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])) if store else {}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit, store=store, **numbers)
    return device


def destroy_process_group() -> None:
    """Wait for the others and leave the process group: one that leaves early can abort the ones that are still leaving."""
    dist.barrier(control_group())  # of Gloo: NCCL's would guess this process's GPU, and warn that it does
    dist.destroy_process_group()
    control_group.cache_clear()


@cache
def control_group() -> dist.ProcessGroup:
    """A Gloo group of all processes for the small messages of the loop, which must not wait for a GPU's queue."""
    return dist.new_group(backend="gloo")


def all_gather_objects(value: Any) -> list[Any]:
    """Every process's value, by rank, on every process; joins them first. Collective."""
    init_process_group()
    return gather_values(value, control_group()) if dist.get_world_size() > 1 else [value]


def limit_waits(at_least: float = 0.0) -> None:
    """Let a process wait HANG_SECONDS for the others in any exchange before it gives up, or `at_least` seconds if that is more.

    A rank that hangs without dying is noticed by nothing else, and the groups that DeepSpeed makes wait for 10 to 30 minutes.
    Without HANG_SECONDS (cluster/ sets it), or without other processes, PyTorch's own limits stay. Call it when all groups
    are there.
    """
    import torch.distributed as dist

    limit = float(os.environ.get("HANG_SECONDS") or 0)
    if not limit or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    c10d = dist.distributed_c10d
    for group in list(c10d._world.pg_names):  # private, and the only way to reach the groups that DeepSpeed made
        if isinstance(group, dist.ProcessGroup):
            c10d._set_pg_timeout(timedelta(seconds=max(limit, at_least)), group)
