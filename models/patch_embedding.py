"""From pixels to tokens and from tokens to one vector: patch embeddings, positions, poolings.

A patch embedding maps images (B, 3, S, S) to tokens (B, T, C), a position adds where each token stands, a pooling maps
(B, T, C) to (B, C). Class tokens, where the pooling has one, stand before the patch tokens. A position may also turn
queries and keys inside every attention: its `rotation()` then returns the module that does so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError
from models.embedding_stems import PoolStem, ResidualStem
from models.parts import Dimensions


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
            raise SettingsError(
                f"patch_embedding=conv_stem: model.patch must be a power of 2 and layers from its logarithm to 8, "
                f"not patch={dims.patch}, layers={layers}"
            )
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
