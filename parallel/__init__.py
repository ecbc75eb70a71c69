"""How many processes train one model: the table of strategies behind one contract (`engine.py`)."""

from __future__ import annotations

from importlib import import_module

from parallel.engine import Counts, Engine
from settings import SettingsError, unknown

STRATEGIES = {
    "zero": "DeepSpeed's engine: data parallel, with optimiser, gradients and parameters sharded by stage 0 to 3",
    "pipeline": "DeepSpeed's pipeline: the layers are cut into stages, and the stages repeated as replicas",
    "ddp": "PyTorch's DistributedDataParallel: every process holds the whole model; the plain baseline",
    "fsdp": "PyTorch's fully_shard: parameters, gradients and optimiser sharded layer by layer, as stage 3 of zero does",
    "dp": "PyTorch's DataParallel: one process drives all GPUs of one machine; the baseline of old",
    "gossip": "every worker steps alone, then averages its weights with a few neighbours: no all-reduce",
    "local": "every worker steps alone for many steps, then all make one outer step together (DiLoCo), for slow links",
}

__all__ = ["STRATEGIES", "Counts", "Engine", "engine_class"]


def engine_class(name: str) -> type[Engine]:
    """The Engine of a strategy. Raises SettingsError for an unknown name. Imported when asked for: DeepSpeed takes seconds."""
    if name not in STRATEGIES:
        raise SettingsError(unknown("strategy", name, list(STRATEGIES)))
    return import_module(f"parallel.{name}").Engine
