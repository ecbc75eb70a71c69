"""Where tokens stand: a table of positions, added to tokens or turned into queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError
from models.parts import Dimensions


class NoPosition(nn.Module):
    """Tokens as they are: the network is told nothing of where they stand."""

    def __init__(self, dims: Dimensions):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x

    def rotation(self) -> nn.Module | None:
        """What turns queries and keys (B, H, T, D) inside attention, a new one at each call; None where nothing does."""
        return None


class LearnedPosition(NoPosition):
    """One learnt vector a token, added (arXiv 2010.11929)."""

    no_weight_decay = {"table"}

    def __init__(self, dims: Dimensions):
        super().__init__(dims)
        self.table = nn.Parameter(0.02 * torch.randn(dims.num_tokens, dims.width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class SinCosPosition(NoPosition):
    """Fixed sines and cosines of row and column, half the channels each, added to patch tokens (arXiv 2205.01580)."""

    def __init__(self, dims: Dimensions):
        super().__init__(dims)
        angles = grid_angles(dims, dims.width, base=10_000.0, setting="model.width")
        table = torch.cat([angles.sin(), angles.cos()], dim=1)
        self.register_buffer("table", F.pad(table, (0, 0, dims.num_prefix, 0)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.to(x.dtype)


class RotaryPosition(NoPosition):
    """Queries and keys turned by angles of row and column, so that scores know the distance (arXiv 2104.09864, 2-D as in 2403.13298)."""

    def __init__(self, dims: Dimensions, base: float = 100.0):
        super().__init__(dims)
        self.dims, self.base = dims, base

    def rotation(self) -> nn.Module:
        return Rotation(self.dims, self.base)


class Rotation(nn.Module):
    """(B, H, T, D) -> (B, H, T, D): pairs of channels turned, half of them by the token's row, half by its column.

    Only tokens with a place on the grid turn; class tokens before them and head tokens after them stay as they are.
    """

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
    """An angle for each patch token and pair of channels, (T without class tokens, channels / 2): row, then column, times a frequency."""
    if channels % 4:
        raise SettingsError(f"this model.position needs a {setting} that 4 divides, not {channels}")
    frequencies = base ** (-torch.arange(channels // 4) / (channels // 4))
    place = torch.arange(dims.grid).unsqueeze(1) * frequencies
    rows, columns = place.repeat_interleave(dims.grid, dim=0), place.repeat(dims.grid, 1)
    return torch.cat([rows, columns], dim=1)


POSITIONS = {"learned": LearnedPosition, "sin_cos": SinCosPosition, "rotary": RotaryPosition, "none": NoPosition}
