"""What a strategy would not use is refused by name, so that nobody believes in a setting that did nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from torch import nn

from settings import ParallelSettings, Settings, SettingsError

# The keys of ds_config.json that every strategy honours. `optimizer` is checked by the optimiser, which knows its own.
PLAIN_KEYS = ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping", "optimizer", "bf16.enabled")
# Keys that say nothing as long as they have the values that ds_config.json comes with.
NEUTRAL = {"zero_optimization.stage": 1, "zero_optimization.offload_optimizer.device": "none"}


def refuse_unused(strategy: str, settings: Settings, honours: frozenset[str], honours_deepspeed: bool) -> None:
    """Raises SettingsError for a changed setting that the strategy would not use, or a missing one that it needs."""
    found = dict(leaves(settings.engine))
    if "gradient_clipping" not in found:
        raise SettingsError("ds_config.json lacks gradient_clipping; DeepSpeed would clip at 1.0 unasked, so write it down (0.0 is off)")
    for field in fields(ParallelSettings):
        value = getattr(settings.parallel, field.name)
        if field.name not in honours and value != field.default:
            raise SettingsError(f"strategy {strategy} would not use parallel.{field.name}={value}")
    for path, value in found.items() if not honours_deepspeed else ():
        known = any(path == key or path.startswith(f"{key}.") for key in PLAIN_KEYS)
        if not known and not (path in NEUTRAL and value == NEUTRAL[path]):
            raise SettingsError(f"strategy {strategy} would not use {path}={value} of ds_config.json; zero does")


def leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf of nested dictionaries."""
    for key, value in tree.items():
        where = f"{path}.{key}" if path else key
        yield from leaves(value, where) if isinstance(value, dict) else [(where, value)]


def refuse_scalars(model: nn.Module, who: str) -> None:
    """Raises SettingsError for a parameter without a dimension."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise SettingsError(f"parameter {name} has no dimension, which {who} cannot broadcast; give it the shape (1,)")
