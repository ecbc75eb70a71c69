"""Checks that reject settings without effect under a strategy, and states of another network."""

from __future__ import annotations

import re
from dataclasses import fields

from torch import Tensor, nn

from common.errors import SettingsError
from config.differences import leaves
from config.settings import ParallelSettings, Settings
from optim.optimizers import AVERAGES_WEIGHTS

# The keys of ds_config.json that every strategy uses. The optimizer checks its own parameters.
PLAIN_KEYS = ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping", "optimizer", "bf16.enabled")
# Keys without effect that are accepted with the values of the original ds_config.json.
NEUTRAL = {"zero_optimization.stage": 1, "zero_optimization.offload_optimizer.device": "none"}


def check_unused_settings(
    strategy: str, settings: Settings, used_settings: frozenset[str], uses_full_ds_config: bool
) -> None:
    """Raise SettingsError for a changed setting that the strategy would not use."""
    for field in fields(ParallelSettings):
        value = getattr(settings.parallel, field.name)
        if field.name not in used_settings and value != field.default:
            raise SettingsError(f"strategy {strategy} would not use parallel.{field.name}={value}")
    for path, value in leaves(settings.engine) if not uses_full_ds_config else ():
        known = any(path == key or path.startswith(f"{key}.") for key in PLAIN_KEYS)
        if not known and not (path in NEUTRAL and value == NEUTRAL[path]):
            raise SettingsError(
                f"strategy {strategy} would not use {path}={value} of ds_config.json; --strategy zero does"
            )


def check_no_scalar_parameters(model: nn.Module, who: str) -> None:
    """Raise SettingsError for a parameter without a dimension."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise SettingsError(
                f"parameter {name} has no dimension, which {who} cannot broadcast; give it the shape (1,)"
            )


def describe_mismatch(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Return how the weights of a state differ from a network with these shapes; None when they fit."""
    weights = re.compile(r"(\d+/)?weights/")  # with the rank before it where each worker has its own
    stored = {weights.sub("", key, 1): tuple(value.shape) for key, value in state.items() if weights.match(key)}
    wrong = [
        f"{name} is {stored.get(name, 'missing')}, here {shapes.get(name, 'it does not exist')}"
        for name in sorted(stored.keys() | shapes.keys())
        if stored.get(name) != shapes.get(name)
    ]
    if not wrong:
        return None
    more = f", and {len(wrong) - 1} more tensors" if wrong[1:] else ""
    return (
        f"the checkpoint holds another network: {wrong[0]}{more}; "
        "the code has changed since. Check out the commit in run.json, or start over with --fresh"
    )


def check_network_settings(model: nn.Module, settings: Settings) -> None:
    """Raise SettingsError for settings that do not apply to this network."""
    name = settings.engine["optimizer"]["type"]
    if name in AVERAGES_WEIGHTS and any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()
    ):
        raise SettingsError(
            f"optimizer.type={name} evaluates other weights than it trains, and BatchNorm's statistics would be "
            "those of "
            "the trained ones; choose another optimizer (ema.decay averages both) or a network without BatchNorm"
        )
    if settings.channels_last and not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise SettingsError(
            "channels_last=true applies to convolutions, and this network has none; add --set channels_last=false"
        )
