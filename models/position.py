"""Positional embeddings: added to the tokens, or rotations of queries and keys inside attention."""

from __future__ import annotations

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
        self.table = nn.Parameter(0.02 * torch.randn(dims.num_tokens, dims.width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class SinCosPosition(NoPosition):
    """Fixed 2-D sine-cosine position embedding, added to patch tokens (formula of MoCo v3, arXiv 2104.02057).

    Half of the channels encode the row, half the column. The frequencies are base ** (-i / n), i = 0 ... n - 1, as in
    MoCo v3; big_vision (arXiv 2205.01580) divides by n - 1 instead.
    """

    table: Tensor

    def __init__(self, dims: Dimensions):
        super().__init__(dims)
        angles = grid_angles(dims, dims.width, base=10_000.0, setting="model.width")
        table = torch.cat([angles.sin(), angles.cos()], dim=1)
        self.register_buffer("table", F.pad(table, (0, 0, dims.num_prefix, 0)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.to(x.dtype)


class RotaryPosition(NoPosition):
    """2-D rotary position embedding (RoPE): scores depend on relative position (arXiv 2104.09864, 2403.13298)."""

    def __init__(self, dims: Dimensions, base: float = 100.0):
        super().__init__(dims)
        self.dims, self.base = dims, base

    def rotation(self) -> nn.Module:
        return Rotation(self.dims, self.base)


class Rotation(nn.Module):
    """Rotates pairs of channels, (B, H, T, D) -> same: half of the pairs by the row, half by the column of the token.

    Only patch tokens are rotated. CLS tokens before them and head tokens after them are unchanged.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, dims: Dimensions, base: float):
        super().__init__()
        angles = grid_angles(dims, dims.head_size, base, setting="model.head_size")
        self.on_grid = slice(dims.num_prefix, dims.num_tokens)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, :, self.on_grid].chunk(2, dim=-1)
        turned = torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], dim=-1)
        return torch.cat([x[:, :, : self.on_grid.start], turned, x[:, :, self.on_grid.stop :]], dim=2)


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


POSITIONS = {"learned": LearnedPosition, "sin_cos": SinCosPosition, "rotary": RotaryPosition, "none": NoPosition}
