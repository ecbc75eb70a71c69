"""What the published networks share: stochastic depth, the two-layer MLP, initialisation, the mark of the settings they read."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.settings import ModelSettings

Architecture = Callable[
    [ModelSettings, int, int], list[nn.Module]
]  # settings, number of classes K, image side S -> layers


def uses_settings(*names: str) -> Callable[[Architecture], Architecture]:
    """Mark an architecture with the fields of ModelSettings that it reads (`used_settings`); its name fixes all the others."""

    def mark(build: Architecture) -> Architecture:
        build.used_settings = frozenset(names)
        return build

    return mark


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth's probability for each block, rising linearly from 0 (arXiv 1603.09382)."""
    return [last * i / max(1, depth - 1) for i in range(depth)]


def init_linear(module: nn.Module) -> None:
    """For `apply`: linear maps as vision transformers start them, from a narrow truncated normal, without bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class DropPath(nn.Module):
    """Stochastic depth: in training, a residual branch is left out for a random share of the images (arXiv 1603.09382)."""

    def __init__(self, probability: float):
        super().__init__()
        self.is_on = probability > 0
        # A tensor, because torch.compile would compile each block anew for another number.
        self.register_buffer("keep", torch.tensor(1 - probability), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.is_on:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < self.keep
        return x * torch.where(kept, 1 / self.keep, 0.0).to(x.dtype)


class MLP(nn.Module):
    """Two linear maps with GELU between, on the last dimension: (..., C) -> (..., C)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x)))
