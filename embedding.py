"""From pixels to tokens and from tokens to one vector: patch embeddings, positions, poolings.

A patch embedding maps images (B, 3, S, S) to tokens (B, T, C), a position adds where each token stands, a pooling maps
(B, T, C) to (B, C). Class tokens, where the pooling has one, stand before the patch tokens. A position may also turn
queries and keys inside every attention: its `rotation()` then returns the module that does so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedding_stems import PoolStem, ResidualStem
from parts import Dimensions
from settings import SettingsError


def to_patches(images: Tensor, patch: int) -> Tensor:
    """Cut (B, A, S, S) into non-overlapping patches: (B, (S/P)^2, A P P), row by row."""
    return F.unfold(images, kernel_size=patch, stride=patch).transpose(1, 2)


class LinearPatches(nn.Module):
    """Each patch flattened and mapped to the width (arXiv 2010.11929)."""

    def __init__(self, dims: Dimensions):
        super().__init__()
        self.patch = dims.patch
        self.project = nn.Linear(3 * dims.patch**2, dims.width)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(to_patches(images, self.patch))


class ShiftedPatches(nn.Module):
    """SPT: the image and four copies shifted diagonally by half a patch, cut together (arXiv 2112.13492, section 3.1)."""

    def __init__(self, dims: Dimensions):
        super().__init__()
        self.patch = dims.patch
        values = 5 * 3 * dims.patch**2
        self.norm = nn.LayerNorm(values)
        self.project = nn.Linear(values, dims.width)

    def forward(self, images: Tensor) -> Tensor:
        S, s = images.shape[-1], self.patch // 2
        padded = F.pad(images, (s, s, s, s))
        corners = [(0, 0), (0, 2 * s), (2 * s, 0), (2 * s, 2 * s)]
        shifted = [padded[..., y : y + S, x : x + S] for y, x in corners]
        return self.project(self.norm(to_patches(torch.cat([images, *shifted], dim=1), self.patch)))


class ConvolutionStem(nn.Module):
    """3x3 convolutions, the last of stride 2 until one pixel is one token, channels doubling to C (arXiv 2106.14881, 2210.05958).

    GroupNorm of one group where the papers have BatchNorm: an image does not depend on its batch mates, and processes
    have no running statistics to keep equal.
    """

    def __init__(self, dims: Dimensions, layers: int = 2):
        super().__init__()
        halvings = dims.patch.bit_length() - 1
        if dims.patch != 2**halvings or not halvings <= layers <= 8 or layers < 1:
            raise SettingsError(f"patch_embedding=conv_stem: model.patch must be a power of 2 and layers from its logarithm to 8, "
                                f"not patch={dims.patch}, layers={layers}")
        channels = [3, *(max(1, dims.width >> (layers - 1 - i)) for i in range(layers))]
        steps: list[nn.Module] = []
        for i in range(layers):
            last, stride = i == layers - 1, 2 if i >= layers - halvings else 1
            steps.append(nn.Conv2d(channels[i], channels[i + 1], kernel_size=3, stride=stride, padding=1, bias=last))
            steps += [] if last else [nn.GroupNorm(1, channels[i + 1]), nn.GELU()]
        self.steps = nn.Sequential(*steps)

    def forward(self, images: Tensor) -> Tensor:
        return self.steps(images).flatten(2).transpose(1, 2)


PATCH_EMBEDDINGS = {
    "linear": LinearPatches,
    "spt": ShiftedPatches,
    "conv_stem": ConvolutionStem,
    "residual_stem": ResidualStem,
    "pool_stem": PoolStem,
}


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


POSITIONS = {
    "learned": LearnedPosition,
    "sin_cos": SinCosPosition,
    "rotary": RotaryPosition,
    "none": NoPosition,
}


class ClassTokenPooling(nn.Module):
    """The first token, a learnt one without a patch, speaks for the image (arXiv 2010.11929)."""

    num_prefix = 1

    def __init__(self, dims: Dimensions):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class MeanPooling(nn.Module):
    """The mean of all tokens."""

    num_prefix = 0

    def __init__(self, dims: Dimensions):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class SequencePooling(nn.Module):
    """A mean of all tokens by learnt weights: softmax of a linear score of each (arXiv 2104.05704, section 3.2)."""

    num_prefix = 0

    def __init__(self, dims: Dimensions):
        super().__init__()
        self.score = nn.Linear(dims.width, 1, bias=False)  # a bias would cancel in the softmax

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(x).softmax(dim=1)  # (B, T, 1)
        return (weights.transpose(1, 2) @ x).squeeze(1)


POOLINGS = {
    "class_token": ClassTokenPooling,
    "mean": MeanPooling,
    "sequence": SequencePooling,
}
