"""Dense 3x3 convolutions with norm and ReLU, shared by stems and feed-forwards.

Tokens (B, T, C), viewed as images (B, C, h, h), are in the memory format channels-last. CPUs run convolutions fastest
in that format, and neither direction copies anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError, unknown
from models.parts import Dimensions

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(1, channels),
}


def check_norm(part: str, norm: str) -> None:
    """Raise SettingsError if NORMS has no entry `norm`."""
    if norm not in NORMS:
        raise SettingsError(f"{part}: " + unknown("norm", norm, list(NORMS)))


class ConvolveNorm(nn.Module):
    """3x3 convolution, 2x2 max-pooling if `pool`, norm, ReLU: (B, A, h, h) -> (B, A', h, h) or (B, A', h/2, h/2)."""

    def __init__(self, before: int, after: int, norm: str, pool: bool = False):
        super().__init__()
        self.convolve = nn.Conv2d(before, after, kernel_size=3, padding=1, bias=False)
        self.norm = NORMS[norm](after)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolve(x)
        return F.relu(self.norm(F.max_pool2d(x, 2) if self.pool else x))


class ResidualPair(nn.Sequential):
    """x + two ConvolveNorm in sequence: (B, A, h, h) -> same."""

    def __init__(self, channels: int, norm: str):
        super().__init__(ConvolveNorm(channels, channels, norm), ConvolveNorm(channels, channels, norm))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ResidualConvolution(nn.Module):
    """Two dense 3x3 convolutions over the token grid, each with norm and ReLU (arXiv 1512.03385); hidden=0 means C.

    The module has its own norms, so a block adds no LayerNorm before it; the residual connection of the block is its
    shortcut. Class tokens are not on the grid and get 0: with pooling=class_token the convolutions of the last block
    do not reach the scores. `norm` is "batch", which learns fastest, or "group": a GroupNorm of one group. With
    "group" an image does not depend on the other images of its batch, in training either.
    """

    num_matrices = 18  # times C x F weights
    own_norm = True

    def __init__(self, dims: Dimensions, hidden: int = 0, norm: str = "batch"):
        super().__init__()
        check_norm("feed_forward=residual_conv", norm)
        self.num_prefix = dims.num_prefix
        self.first = ConvolveNorm(dims.width, hidden or dims.width, norm)
        self.second = ConvolveNorm(hidden or dims.width, dims.width, norm)
        self.dropout = nn.Dropout(dims.dropout)

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, self.num_prefix :] if self.num_prefix else x
        grid = math.isqrt(patches.shape[1])  # with progressive resizing it differs between steps
        image = patches.transpose(1, 2).unflatten(2, (grid, grid))  # (B, C, S/P, S/P)
        patches = self.dropout(self.second(self.first(image)).flatten(2).transpose(1, 2))
        if not self.num_prefix:
            return patches
        return torch.cat([torch.zeros_like(x[:, : self.num_prefix]).to(patches.dtype), patches], dim=1)
