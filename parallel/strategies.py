"""How many processes train one model: the table of strategies behind one contract (`engine.py`)."""

from __future__ import annotations

import os
from importlib import import_module

import torch

from common.errors import SettingsError, unknown
from parallel.batch_sizes import EvalCounts
from parallel.engine import Engine

STRATEGIES = {
    "zero": "DeepSpeed's engine: data parallel, with optimiser, gradients and parameters sharded by stage 0 to 3",
    "pipeline": "DeepSpeed's pipeline: the layers are cut into stages, and the stages repeated as replicas",
    "ddp": "PyTorch's DistributedDataParallel: every process holds the whole model; the plain baseline",
    "fsdp": "PyTorch's fully_shard: parameters, gradients and optimiser sharded layer by layer, as stage 3 of zero does",
    "dp": "PyTorch's DataParallel: one process drives all GPUs of one machine; the baseline of old",
    "gossip": "every worker steps alone, then averages its weights with a few neighbours: no all-reduce",
    "local": "every worker steps alone for many steps, then all make one outer step together (DiLoCo), for slow links",
}
MODULES = {
    "zero": "parallel.zero",
    "pipeline": "parallel.pipeline",
    "ddp": "parallel.ddp",
    "fsdp": "parallel.fsdp",
    "dp": "parallel.dp",
    "gossip": "parallel.gossip",
    "local": "parallel.local",
}
PEER_MODULES = {"local": "parallel.peers.engine"}  # may also run as jobs of their own that meet over a network
WITH_DEEPSPEED = ("zero", "pipeline")

__all__ = ["STRATEGIES", "EvalCounts", "Engine", "engine_class"]


def engine_class(name: str, peers: bool = False) -> type[Engine]:
    """The Engine of a strategy, or its form for peers, which takes a `meeting` too. Imported when asked for: DeepSpeed takes seconds.

    Raises:
        SettingsError: an unknown name, or peers for a strategy whose workers are the processes of one job.
    """
    if name not in STRATEGIES:
        raise SettingsError(unknown("strategy", name, list(STRATEGIES)))
    if (peers or name in WITH_DEEPSPEED) and not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it searches for a GPU, and warns that there is none
    if not peers:
        return import_module(MODULES[name]).Engine
    if name not in PEER_MODULES:
        raise SettingsError(f"--host-peers and --join are for --strategy {' and '.join(PEER_MODULES)}, not {name}")
    return import_module(PEER_MODULES[name]).Engine
