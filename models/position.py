"""Positional embeddings: added to the tokens, or rotations of queries and keys inside attention.

Under progressive resizing the first steps have fewer tokens than the network was built for. Positions are resampled
from the grid of the full image, so that a place in the image keeps its position.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError
from models.parts import Dimensions


class NoPosition(nn.Module):
    """No positional embedding."""

    def __init__(self, dims: Dimensions):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x

    def rotation(self) -> nn.Module | None:
        """Return a new module that rotates queries and keys (B, H, T, D) inside attention, or None."""
        return None


class LearnedPosition(NoPosition):
    """Learned absolute position embedding: one vector per token, added (arXiv 2010.11929)."""

    no_weight_decay = {"table"}
    position_tables = {"table"}

    def __init__(self, dims: Dimensions):
        super().__init__(dims)
        self.num_prefix = dims.num_prefix
        self.table = nn.Parameter(0.02 * torch.randn(dims.num_tokens, dims.width))

    def forward(self, x: Tensor) -> Tensor:
        return x + resampled(self.table, self.num_prefix, x.shape[1])


class SinCosPosition(NoPosition):
    """Fixed 2-D sine-cosine position embedding, added to patch tokens (formula of MoCo v3, arXiv 2104.02057).

    Half of the channels encode the row, half the column. The frequencies are base ** (-i / n), i = 0 ... n - 1, as in
    MoCo v3; big_vision (arXiv 2205.01580) divides by n - 1 instead.
    """

    table: Tensor

    def __init__(self, dims: Dimensions):
        super().__init__(dims)
        self.num_prefix = dims.num_prefix
        angles = grid_angles(dims, dims.width, base=10_000.0, setting="model.width")
        table = torch.cat([angles.sin(), angles.cos()], dim=1)
        self.register_buffer("table", F.pad(table, (0, 0, dims.num_prefix, 0)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + resampled(self.table, self.num_prefix, x.shape[1]).to(x.dtype)


class RotaryPosition(NoPosition):
    """2-D rotary position embedding (RoPE): scores depend on relative position (arXiv 2104.09864, 2403.13298)."""

    def __init__(self, dims: Dimensions, base: float = 100.0):
        super().__init__(dims)
        if base <= 0:
            raise SettingsError(f"model.position_options.base must be above 0, got {base}. Set it to 100.0")
        self.dims, self.base = dims, base

    def rotation(self) -> nn.Module:
        return Rotation(self.dims, self.base)


class Rotation(nn.Module):
    """Rotates pairs of channels, (B, H, T, D) -> same: half of the pairs by the row, half by the column of the token.

    Only patch tokens are rotated. CLS tokens before them and head tokens after them are unchanged.

    Attributes:
        num_added: tokens that the attention adds after those of the image, `num_added_tokens` of its module.
    """

    angles: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, dims: Dimensions, base: float):
        super().__init__()
        angles = grid_angles(dims, dims.head_size, base, setting="model.head_size")
        self.num_prefix, self.num_added = dims.num_prefix, 0
        self.register_buffer("angles", angles, persistent=False)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin, before = self.cos, self.sin, self.num_prefix
        if (on_grid := x.shape[2] - before - self.num_added) < len(cos):
            angles = resampled(self.angles, 0, on_grid)
            cos, sin = angles.cos(), angles.sin()
        after = before + len(cos)
        a, b = x[:, :, before:after].chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
        return torch.cat([x[:, :, :before], turned, x[:, :, after:]], dim=2)


def grid_angles(dims: Dimensions, channels: int, base: float, setting: str) -> Tensor:
    """Return an angle per patch token and pair of channels, (grid^2, channels / 2): row or column times a frequency.

    Raises:
        SettingsError: `channels`, the value of `setting`, is not a multiple of 4.
    """
    if channels % 4:
        raise SettingsError(f"this model.position needs a multiple of 4 as {setting}, got {channels}")
    frequencies = base ** (-torch.arange(channels // 4) / (channels // 4))
    place = torch.arange(dims.grid).unsqueeze(1) * frequencies
    rows, columns = place.repeat_interleave(dims.grid, dim=0), place.repeat(dims.grid, 1)
    return torch.cat([rows, columns], dim=1)


def resampled(table: Tensor, num_prefix: int, num_tokens: int) -> Tensor:
    """Resample a table with one row per token, (T, C), bilinearly to the grid of another number of tokens.

    The first `num_prefix` rows, such as that of a CLS token, are kept.

    Raises:
        ValueError: `num_tokens` without the prefix is not the size of a square grid.
    """
    if num_tokens == len(table):
        return table
    side, wanted = math.isqrt(len(table) - num_prefix), math.isqrt(max(0, num_tokens - num_prefix))
    if wanted**2 != num_tokens - num_prefix:
        raise ValueError(f"{num_tokens} tokens are no square grid after {num_prefix} others")
    grid = table[num_prefix:].T.reshape(1, -1, side, side)
    rows = F.interpolate(grid, size=(wanted, wanted), mode="bilinear").flatten(2)[0].T
    return torch.cat([table[:num_prefix], rows])


POSITIONS = {"learned": LearnedPosition, "sin_cos": SinCosPosition, "rotary": RotaryPosition, "none": NoPosition}
