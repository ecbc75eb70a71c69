"""How many processes train one model: the table of strategies behind one contract (`engine.py`)."""

from __future__ import annotations

from importlib import import_module

from parallel.engine import Counts, Engine
from settings import SettingsError, unknown

STRATEGIES = {
    "zero": "DeepSpeed's engine: data parallel, with optimiser, gradients and parameters sharded by stage 0 to 3",
}

__all__ = ["STRATEGIES", "Counts", "Engine", "engine_class"]


def engine_class(name: str) -> type[Engine]:
    """The Engine of a strategy. Raises SettingsError for an unknown name. Imported when asked for: DeepSpeed takes seconds."""
    if name not in STRATEGIES:
        raise SettingsError(unknown("strategy", name, list(STRATEGIES)))
    return import_module(f"parallel.{name}").Engine
