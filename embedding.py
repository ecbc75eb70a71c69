"""From pixels to tokens and from tokens to one vector: patch embeddings, positions, poolings.

A patch embedding maps images (B, 3, S, S) to tokens (B, T, C), a position adds where each token stands, a pooling maps
(B, T, C) to (B, C). Class tokens, where the pooling has one, stand before the patch tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts import Dimensions


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


PATCH_EMBEDDINGS = {
    "linear": LinearPatches,
    "spt": ShiftedPatches,
}


class LearnedPosition(nn.Module):
    """One learnt vector a token, added (arXiv 2010.11929)."""

    no_weight_decay = {"table"}

    def __init__(self, dims: Dimensions):
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(dims.num_tokens, dims.width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class NoPosition(nn.Module):
    """Tokens as they are: the network is told nothing of where they stand."""

    def __init__(self, dims: Dimensions):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


POSITIONS = {
    "learned": LearnedPosition,
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


POOLINGS = {
    "class_token": ClassTokenPooling,
    "mean": MeanPooling,
}
