"""Patch embeddings: images (B, 3, S, S) to patch tokens (B, T, C), row by row.

`PATCH_EMBEDDINGS` lists them by name. The linear ones cut the image into patches; the stems are short convolutional
networks that halve the side until one pixel is one token. Class tokens and positions are added by `model.Embed`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError
from models.convolutions import NORMS, ConvolveNorm, ResidualPair, check_norm
from models.parts import Dimensions

# --- linear patch embeddings ------------------------------------------------------------------------------------------


def to_patches(images: Tensor, patch: int) -> Tensor:
    """Cut (B, A, S, S) into non-overlapping patches: (B, (S/P)^2, A P P), row by row."""
    return F.unfold(images, kernel_size=patch, stride=patch).transpose(1, 2)


class LinearPatches(nn.Module):
    """Linear projection of flattened patches (arXiv 2010.11929)."""

    def __init__(self, dims: Dimensions):
        super().__init__()
        self.patch = dims.patch
        self.project = nn.Linear(3 * dims.patch**2, dims.width)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(to_patches(images, self.patch))


class ShiftedPatches(nn.Module):
    """Shifted patch tokenization (SPT): patches of the image and four diagonal shifts (arXiv 2112.13492, section 3.1).

    The shifts are half a patch. A LayerNorm and a linear projection follow the concatenated patches.
    """

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


# --- convolutional stems ----------------------------------------------------------------------------------------------


MAX_LAYERS = 8  # of `ConvolutionStem`


class ConvolutionStem(nn.Module):
    """Convolutional stem: 3x3 convolutions, the last ones with stride 2, up to C (arXiv 2106.14881, 2210.05958).

    Channels double from layer to layer. The papers use BatchNorm; this stem uses a GroupNorm of one group. An image
    then does not depend on the other images of its batch, and there are no running statistics to synchronize.
    """

    def __init__(self, dims: Dimensions, layers: int = 2):
        super().__init__()
        halvings = dims.patch.bit_length() - 1
        if dims.patch != 2**halvings or halvings > MAX_LAYERS:
            fitting = math.gcd(dims.image_side, 2 ** min(halvings, MAX_LAYERS))
            raise SettingsError(
                f"patch_embedding=conv_stem needs a power of 2 up to {2**MAX_LAYERS} as model.patch, got {dims.patch}. "
                f"Set model.patch to {fitting}"
            )
        fewest = max(1, halvings)
        if not fewest <= layers <= MAX_LAYERS:
            raise SettingsError(
                f"patch_embedding=conv_stem needs {fewest} to {MAX_LAYERS} layers with model.patch={dims.patch}, got "
                f"{layers}. Set model.patch_embedding_options.layers to {fewest}"
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


class Residual(nn.Module):
    """Pre-activation residual block (arXiv 1603.05027), (B, A, h, h) -> same: x + two times norm, GELU, 3x3 conv."""

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


class ResidualStem(nn.Module):
    """ResNet-style stem: residual blocks with stride-2 downsampling; channels double per stage.

    It is the hybrid of arXiv 2010.11929 (section 3.1) in small. Convolutions process the pixels, where they work best
    and where tensor cores are used best. A 3x3 convolution to `first` channels comes first. Each stage has `blocks`
    residual blocks and a stride-2 convolution, until one pixel is one token; the last stage ends with C channels.
    `norm` is "batch", which learns fastest, or "group": a GroupNorm of one group. With "group" an image does not depend
    on the other images of its batch, in training either.

    `space_to_depth` replaces the stage at full resolution: each square of 2x2 pixels becomes one pixel of 12 channels,
    and the first convolution, which now covers 6x6 pixels, has the channels of the second stage.
    """

    def __init__(
        self, dims: Dimensions, first: int = 64, blocks: int = 1, norm: str = "batch", space_to_depth: bool = False
    ):
        super().__init__()
        halvings = count_halvings("residual_stem", dims.patch, first, blocks)
        check_norm("patch_embedding=residual_stem", norm)
        self.factor = 2 if space_to_depth else 1
        channels = [*(first << i for i in range(halvings)), dims.width][space_to_depth:]
        steps: list[nn.Module] = [nn.Conv2d(3 * self.factor**2, channels[0], kernel_size=3, padding=1, bias=False)]
        for before, after in zip(channels, channels[1:], strict=False):
            steps += [Residual(before, norm) for _ in range(blocks)]
            steps += [NORMS[norm](before), nn.GELU(), nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)]
        self.steps = nn.Sequential(*steps)
        mark_inner_steps(self.steps)

    def forward(self, images: Tensor) -> Tensor:
        if self.factor > 1:
            images = F.pixel_unshuffle(images, self.factor)
        return self.steps(images).flatten(2).transpose(1, 2)


class PoolStem(nn.Module):
    """Convolutional stem with max-pooling: 3x3 convolutions, norm, ReLU and 2x2 pooling until a pixel is a token.

    The first convolution has `first` channels, the last one C; between two poolings they are twice, four times ...
    `first`, with `blocks` pairs of convolutions and a shortcut. `norm` as in `residual_stem`. The stem is made for
    CPUs: few channels at the full side, and the memory format channels-last from the start.
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
        mark_inner_steps(self.steps)

    def forward(self, images: Tensor) -> Tensor:
        return self.steps(images.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)


def count_halvings(name: str, patch: int, first: int, blocks: int) -> int:
    """Return how often a stem halves the side until a patch is one pixel.

    Raises:
        SettingsError: these sizes make no stem.
    """
    halvings = patch.bit_length() - 1
    if patch != 2**halvings or halvings < 1 or first < 1 or blocks < 0:
        raise SettingsError(
            f"patch_embedding={name} needs a power of 2 (2 or more) as model.patch, first >= 1 and blocks >= 0, got "
            f"patch={patch}, first={first}, blocks={blocks}"
        )
    return halvings


def mark_inner_steps(steps: nn.Sequential) -> None:
    """Let Muon train all convolutions but the first, which reads the images (see `optim/param_groups.py`)."""
    for step in list(steps)[1:]:
        step.is_input_or_output_layer = False  # type: ignore[assignment]  # modules take any attribute


PATCH_EMBEDDINGS = {
    "linear": LinearPatches,
    "spt": ShiftedPatches,
    "conv_stem": ConvolutionStem,
    "residual_stem": ResidualStem,
    "pool_stem": PoolStem,
}
