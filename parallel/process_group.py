"""The process group: this process's rank and device, joining the other processes, and limits of waiting for them."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from common.errors import RunError, SettingsError, StoppedError, UserError
from common.machine import free_port
from common.memory import keep_freed_memory
from common.stop_signal import stop_requested
from common.text import first_line
from parallel.plain_objects import gather_values
from parallel.rank_store import LOOPBACK, make_store

LOGGER = logging.getLogger("engine")  # train.py shows its lines on the console
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEVICES = ("", "cpu", "cuda")  # values of DS_ACCELERATOR that this project trains with
SAY_SECONDS = 5.0  # of waiting for other processes before a line says so
LOOK_SECONDS = 0.1  # between two looks at the stop signal while waiting


def check_environment() -> None:
    """Check the variables by which a launcher describes the processes of a run.

    Raises:
        SettingsError: a variable that is missing, left over from another run, or not a valid number.
    """
    accelerator = os.environ.get("DS_ACCELERATOR", "")
    if accelerator not in DEVICES:
        raise SettingsError(f"DS_ACCELERATOR={accelerator} is unknown; write DS_ACCELERATOR=cpu, or unset it")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdecimal()):
            raise SettingsError(f"{name}={value!r} is not a number; unset it, or start with ./launch_local_train.sh")
    if not re.fullmatch(r"(\d+(\.\d*)?|\.\d+)?", os.environ.get("HANG_SECONDS", "")):
        raise SettingsError(f"HANG_SECONDS={os.environ['HANG_SECONDS']} is not a number of seconds; unset it")
    if "RANK" not in os.environ:
        given_size = os.environ.get("WORLD_SIZE", "1")
        if given_size != "1":
            raise SettingsError(
                f"WORLD_SIZE={given_size} is set, but RANK is not; unset WORLD_SIZE, or start with a launcher"
            )
        return
    missing = [name for name in RANK_VARIABLES if not os.environ.get(name)]
    if missing:
        raise SettingsError(
            f"RANK is set, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not; "
            "unset RANK to train with one process, or start with a launcher"
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= world_size:
        raise SettingsError(f"RANK={rank} must be below WORLD_SIZE={world_size}; start with a launcher")


def local_rank() -> int:
    """This process's number on its host; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def num_local() -> int:
    """Number of processes on this host; torchrun and DeepSpeed's launcher use different variables for it."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return dist.get_world_size()


def pick_device() -> torch.device:
    """Return the GPU of this process's local rank, or the CPU without a GPU or with DS_ACCELERATOR=cpu."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        raise SettingsError(
            f"LOCAL_RANK={local_rank()}, but this machine has {torch.cuda.device_count()} GPU(s); "
            "start one process per GPU"
        )
    torch.cuda.set_device(local_rank())
    # PyTorch would compute convolutions, and these alone, with 10 bits of mantissa. bf16 is for speed; fp32 is fp32.
    torch.backends.cudnn.allow_tf32 = False
    # Sizes are fixed, so cuDNN may try its algorithms once. The fastest one may differ between runs: not if
    # deterministic.
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    return torch.device("cuda", local_rank())


def init_process_group(timeout_seconds: float = 600) -> torch.device:
    """Join the process group that a launcher described in the environment; without one, make a group of one.

    The backend is NCCL on GPUs and Gloo on CPUs. Where all processes are on this machine (they meet at a loopback
    address), no other machine can connect to any of them.

    Returns:
        The device of this process.

    Raises:
        SettingsError: the environment of a launcher is incomplete.
        StoppedError: a signal asked to stop while this process waited.
        RunError: the other processes did not come in time.
    """
    device = pick_device()
    if "RANK" not in os.environ:
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        os.environ.update(alone)
    if not dist.is_initialized():
        check_environment()
        _join_in_thread(device, timeout_seconds)
    return device


def _join(device: torch.device, timeout_seconds: float) -> None:
    limit = timedelta(seconds=timeout_seconds)
    if os.environ["MASTER_ADDR"] in LOOPBACK:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    store = make_store(limit)
    numbers: dict[str, Any] = {}
    if store:
        numbers = dict(rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit, store=store, **numbers)


def _join_in_thread(device: torch.device, timeout_seconds: float) -> None:
    """Join in a thread, so that this one can say for whom it waits and can react to signals.

    PyTorch waits in C++, where Python's signal handlers do not run.
    """
    failures: list[BaseException] = []

    def join() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # the current device belongs to a thread
            _join(device, timeout_seconds)
        except BaseException as error:
            failures.append(error)

    began, said = time.monotonic(), False
    rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    thread = threading.Thread(target=join, name="join the process group", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_SECONDS)
        if stop_requested() and thread.is_alive():
            raise StoppedError(f"stopped while process {rank} of {world_size} waited for the others at {meeting}")
        if not said and thread.is_alive() and time.monotonic() - began > SAY_SECONDS:
            said = True
            LOGGER.warning(
                "waiting   process %s of %s waits at %s for the other processes, up to %.0f s",
                rank, world_size, meeting, timeout_seconds,
            )  # fmt: skip
    if failures:
        error = failures[0]  # of PyTorch's store, or of the port, unless it is ours
        if isinstance(error, (RuntimeError, OSError, ValueError, OverflowError)) and not isinstance(error, UserError):
            raise RunError(
                f"process {rank} of {world_size} could not join the others at {meeting}: {first_line(error)}. "
                "Start all processes with a free MASTER_PORT, or unset RANK and WORLD_SIZE to train with one"
            ) from error
        raise error


def destroy_process_group() -> None:
    """Wait for the others and leave the process group: a process that leaves early can abort those still leaving."""
    dist.barrier(control_group())  # of Gloo: NCCL's would guess this process's GPU and warn about it
    dist.destroy_process_group()
    control_group.cache_clear()


@cache
def control_group() -> dist.ProcessGroup:
    """A Gloo group of all processes for the small messages of the loop, which must not wait for a GPU's queue."""
    return dist.new_group(backend="gloo")


def all_gather_objects(value: Any) -> list[Any]:
    """Return every process's value, by rank, on every process; joins the process group first. Collective."""
    init_process_group()
    return gather_values(value, control_group()) if dist.get_world_size() > 1 else [value]


def limit_waits(at_least: float = 0.0) -> None:
    """Limit every wait for other processes to HANG_SECONDS, or to `at_least` seconds if that is longer.

    Nothing else notices a rank that hangs without dying, and the groups that DeepSpeed makes wait for 10 to 30 minutes.
    Without HANG_SECONDS (cluster/ sets it), or without other processes, PyTorch's own limits stay. Call it when all
    groups exist.
    """
    limit = float(os.environ.get("HANG_SECONDS") or 0)
    if not limit or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    c10d = dist.distributed_c10d
    for group in list(c10d._world.pg_names):  # private, and the only way to reach the groups that DeepSpeed made
        if isinstance(group, dist.ProcessGroup):
            c10d._set_pg_timeout(timedelta(seconds=max(limit, at_least)), group)
