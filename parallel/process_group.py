"""Joining the process group: which process am I, on which device; and named tensors on their way between processes."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from common.errors import RunError
from parallel.plain_objects import pack, unpack

LOOPBACK = ("127.0.0.1", "localhost")


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

    Returns the device of this process. The backend is NCCL on GPUs and Gloo on CPUs. The store of rank 0 listens on
    MASTER_ADDR alone. If that is a loopback address, nobody outside this machine can connect to any process.
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


def make_store(limit: timedelta) -> dist.Store | None:
    """The store where the ranks meet. It listens on MASTER_ADDR alone, while PyTorch's own listens on every interface.

    Its keys begin with RENDEZVOUS_SECRET if the launcher set one (cluster/job.py). So neither a stranger nor a rank of
    another job at the same port counts as a rank. Returns None, for PyTorch's own store, if torchrun has made a store,
    or if this PyTorch (2.0) cannot choose the interface.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or "master_listen_fd" not in str(
        dist.TCPStore.__init__.__doc__
    ):
        return None
    port, world_size = int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"])
    name, is_first = os.environ["MASTER_ADDR"], os.environ["RANK"] == "0"
    address = "127.0.0.1" if name in LOOPBACK else name
    secret = os.environ.get("RENDEZVOUS_SECRET", "")
    if not is_first:
        store = dist.TCPStore(address, port, world_size, False, limit)
    else:
        try:
            listener = socket.create_server((own_address(address, world_size), port), backlog=2048)
        except OSError as error:
            raise RunError(
                f"cannot listen on MASTER_ADDR={name}, MASTER_PORT={port}: {error.strerror}. Choose a free MASTER_PORT"
            ) from None
        store = dist.TCPStore(address, port, world_size, True, limit, master_listen_fd=listener.detach())
    return dist.PrefixStore(secret, store) if secret else store


def own_address(name: str, world_size: int) -> str:
    """The IPv4 address to listen on for MASTER_ADDR; empty for all, if this machine does not have the address.

    A host's own name often resolves to the loopback there (/etc/hosts), where other hosts cannot connect. Behind address
    translation MASTER_ADDR is not an address of the host.
    """
    try:
        address = socket.gethostbyname(name)
        with socket.socket() as test:
            test.bind((address, 0))
    except OSError:
        return ""
    return "" if address.startswith("127.") and num_local() < world_size else address


@cache
def control_group() -> dist.ProcessGroup:
    """A Gloo group of all processes for the small messages of the loop, which must not wait for a GPU's queue."""
    return dist.new_group(backend="gloo")


def all_gather_objects(value: Any) -> list[Any]:
    """Every process's value, by rank, on every process; joins the process group first. Collective."""
    init_process_group()
    if dist.get_world_size() == 1:
        return [value]
    own = pack(value)
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(own)]), group=control_group())
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(own)] = own
    packed = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(packed, padded, group=control_group())
    return [unpack(data[: int(size)]) for data, size in zip(packed, sizes, strict=True)]


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every process. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    is_first = dist.get_rank() == 0
    own = pack(value) if is_first else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([len(own)])
    dist.broadcast(size, src=0, group=control_group())
    data = own if is_first else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, src=0, group=control_group())
    return value if is_first else unpack(data)


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
