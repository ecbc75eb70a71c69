"""Layers that the published networks share: stochastic depth, the two-layer MLP, initialization.

`uses_settings` marks an architecture with the settings that it reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError
from config.settings import ModelSettings

# settings, number of classes K, image side S -> layers
Architecture = Callable[[ModelSettings, int, int], list[nn.Module]]


def uses_settings(*names: str) -> Callable[[Architecture], Architecture]:
    """Mark an architecture with the fields of ModelSettings that it reads, as its attribute `used_settings`.

    The name of the architecture fixes all other fields.
    """

    def mark(build: Architecture) -> Architecture:
        build.used_settings = frozenset(names)  # type: ignore[attr-defined]  # functions take any attribute
        return build

    return mark


def check_fixed_patch(settings: ModelSettings, patch: int, image_side: int) -> None:
    """Raise SettingsError if the patch that an architecture fixes does not divide the image side."""
    if image_side % patch:
        raise SettingsError(
            f"model.architecture={settings.architecture} has patches of {patch} pixels, which do not divide the "
            f"image side {image_side}. Set a multiple: --set image_side={max(1, image_side // patch) * patch}"
        )


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Return the drop probability of each block, rising linearly from 0 to `last` (arXiv 1603.09382).

    A single block has `last`.
    """
    return [last * i / (depth - 1) for i in range(depth)] if depth > 1 else [last] * depth


def trunc_normal(tensor: Tensor, std: float) -> Tensor:
    """Fill a tensor in place from a normal distribution, cut at six standard deviations.

    PyTorch's `trunc_normal_` cuts at -2 and 2, which is 100 standard deviations at 0.02, as the authors' codes do. It
    then returns exactly -2 for one draw in 2^24: a network of 6 million weights has such an outlier in one of three
    cases. No other draw in float32 exceeds 5.4 standard deviations, so all other values stay as they are.
    """
    nn.init.trunc_normal_(tensor, std=std)
    with torch.no_grad():
        return tensor.clamp_(-6 * std, 6 * std)


def init_linear(module: nn.Module) -> None:
    """Initialize linear maps as vision transformers do, for `apply`: truncated normal (std 0.02) and zero biases."""
    if isinstance(module, nn.Linear):
        trunc_normal(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class DropPath(nn.Module):
    """Stochastic depth: in training, skips a residual branch for a random share of the images (arXiv 1603.09382)."""

    keep: Tensor

    def __init__(self, probability: float):
        super().__init__()
        self.is_on = probability > 0
        # A tensor, because torch.compile recompiles a block for every other Python number.
        self.register_buffer("keep", torch.tensor(1 - probability), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.is_on:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < self.keep
        return x * torch.where(kept, 1 / self.keep, 0.0).to(x.dtype)


class MLP(nn.Module):
    """Two-layer MLP with GELU on the last dimension: (..., C) -> (..., C)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x)))
