"""Patch embeddings with residual convolutions: a short convolutional network before the transformer.

The other patch embeddings, and the table that names these, are in `models/patch_embedding.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError
from models.convolutions import NORMS, ConvolveNorm, ResidualPair, check_norm
from models.parts import Dimensions


class Residual(nn.Module):
    """x + two 3x3 convolutions of it, each after a norm and GELU (arXiv 1603.05027): (B, A, h, h) -> same."""

    def __init__(self, channels: int, norm: str):
        super().__init__()
        self.norms = nn.ModuleList(NORMS[norm](channels) for _ in range(2))
        self.convolve = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, convolve in zip(self.norms, self.convolve, strict=True):
            y = convolve(F.gelu(norm(y)))
        return x + y


def count_halvings(name: str, patch: int, first: int, blocks: int) -> int:
    """How often the side is halved until a patch is one pixel. Raises SettingsError for sizes that make no stem."""
    halvings = patch.bit_length() - 1
    if patch != 2**halvings or halvings < 1 or first < 1 or blocks < 0:
        raise SettingsError(
            f"patch_embedding={name}: model.patch must be a power of 2 from 2 up, first at least 1 and blocks at "
            f"least 0, not patch={patch}, first={first}, blocks={blocks}"
        )
    return halvings


class ResidualStem(nn.Module):
    """A 3x3 convolution to `first` channels, then, until one pixel is one token, residual blocks and a halving, channels doubling.

    The hybrid of arXiv 2010.11929 (section 3.1) in small: what convolutions do best, the first few pixels, is left to them,
    on the tensor cores' favourite operation. The last halving goes to C channels, whatever stands before it. `blocks` is the
    number of residual blocks at each side. `norm` is "batch", which learns fastest, or "group": a GroupNorm of one group, for
    which an image does not depend on its batch mates in training either.
    """

    def __init__(self, dims: Dimensions, first: int = 64, blocks: int = 1, norm: str = "batch"):
        super().__init__()
        halvings = count_halvings("residual_stem", dims.patch, first, blocks)
        check_norm("patch_embedding=residual_stem", norm)
        channels = [*(first << i for i in range(halvings)), dims.width]
        steps: list[nn.Module] = [nn.Conv2d(3, first, kernel_size=3, padding=1, bias=False)]
        for before, after in zip(channels, channels[1:], strict=False):
            steps += [Residual(before, norm) for _ in range(blocks)]
            steps += [NORMS[norm](before), nn.GELU(), nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)]
        self.steps = nn.Sequential(*steps)
        for step in steps[1:]:
            step.is_input_or_output_layer = (
                False  # only the first convolution reads the images; Muon may train the others
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.steps(images).flatten(2).transpose(1, 2)


class PoolStem(nn.Module):
    """A 3x3 convolution to `first` channels, then ones with 2x2 max-pooling until a pixel is a token, the last to C.

    `blocks` residual pairs stand between two poolings, where there are twice, four times ... `first` channels. Every
    convolution has a norm and ReLU after it. `norm` as in `residual_stem`. Made for CPUs: few channels at full side,
    and side by side in memory from the start.
    """

    def __init__(self, dims: Dimensions, first: int = 32, blocks: int = 1, norm: str = "batch"):
        super().__init__()
        halvings = count_halvings("pool_stem", dims.patch, first, blocks)
        check_norm("patch_embedding=pool_stem", norm)
        channels = [first, *(first << i for i in range(1, halvings)), dims.width]
        steps: list[nn.Module] = [ConvolveNorm(3, first, norm)]
        for before, after in zip(channels, channels[1:], strict=False):
            steps += [ResidualPair(before, norm) for _ in range(blocks)] if before != first else []
            steps.append(ConvolveNorm(before, after, norm, pool=True))
        self.steps = nn.Sequential(*steps)
        for step in steps[1:]:
            step.is_input_or_output_layer = (
                False  # only the first convolution reads the images; Muon may train the others
            )

    def forward(self, images: Tensor) -> Tensor:
        return self.steps(images.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)
