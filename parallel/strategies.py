"""The registry of parallelism strategies, which share one interface (`engine.py`)."""

from __future__ import annotations

import os
from importlib import import_module

import torch

from common.errors import SettingsError
from common.packages import check_torch, is_installed
from config.own_parts import find_entry, is_own_part
from parallel.engine import Engine

STRATEGIES: dict[str, object] = {
    "zero": "DeepSpeed's ZeRO: data parallelism; stages 1 to 3 shard optimizer states, gradients and parameters",
    "pipeline": "DeepSpeed's pipeline parallelism: layers are divided into stages, and stages are replicated",
    "ddp": "PyTorch's DistributedDataParallel: every process holds the whole model (the plain baseline)",
    "fsdp": "PyTorch's fully_shard (FSDP2): shards parameters, gradients and optimizer states, like ZeRO stage 3",
    "dp": "PyTorch's DataParallel: one process drives all GPUs of one machine (legacy baseline)",
    "gossip": "decentralized: every worker steps alone, then averages its weights with a few neighbors",
    "local": "DiLoCo, for slow links: every worker makes many local steps, then all make one outer step",
}
WITH_PEERS = "local"  # also available as separate jobs that exchange weights over a network
WITH_DEEPSPEED = ("zero", "pipeline")


def engine_class(name: str, peers: bool = False) -> type[Engine]:
    """Import and return the Engine of `parallel/<name>.py`, or its form for peers, which also takes a `meeting`.

    A user-defined strategy is a subclass of another one's Engine.

    Raises:
        SettingsError: an unknown name, a strategy whose package is not installed or too old, or peers for a strategy
            whose workers are the processes of one job.
    """
    found = find_entry(STRATEGIES, "strategy", name)
    if peers and name != WITH_PEERS:
        raise SettingsError(f"--host-peers and --join need --strategy {WITH_PEERS}, not {name}")
    own = is_own_part(name)
    if (peers or own or name in WITH_DEEPSPEED) and not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed searches for a GPU and warns
    if own:
        if not isinstance(found, type) or not issubclass(found, Engine):
            raise SettingsError(f"strategy={name} must be a subclass of Engine (parallel/engine.py)")
        return found
    if name in WITH_DEEPSPEED and not is_installed("deepspeed"):
        raise SettingsError(
            f"strategy {name} needs DeepSpeed, which is not installed: pip install deepspeed. "
            "--strategy ddp trains without it"
        )
    if name == "fsdp":
        check_torch("strategy fsdp", (2, 6))  # torch.distributed.fsdp.fully_shard
    return import_module("parallel.peers.engine" if peers else f"parallel.{name}").Engine
