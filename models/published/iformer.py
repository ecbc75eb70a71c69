"""Inception Transformer (iFormer, arXiv 2205.12956): convolution, max-pooling and attention in parallel.

Convolution and max-pooling process high frequencies, attention low ones.

Four stages at 1/4, 1/8, 1/16 and 1/32 of the image side; deeper stages give more channels to attention. Published
`drop_path` at 224 pixels: 0.2 (small), 0.4 (base), 0.5 (large); no dropout.

Departures from the authors' code (sail-sg/iFormer):
- position maps have the size of the chosen image side; the code interpolates maps made for 224 pixels;
- weight decay does not apply to the position maps; the code decays them, since its list of exceptions has other names.

B images, h map side, C width, H heads, D head size; maps are channels last, (B, h, h, C), between layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError
from config.settings import ModelSettings
from models.attention import attend
from models.layers import MLP, DropPath, drop_path_rates, trunc_normal, uses_settings

HEAD_SIZE, HIDDEN_FACTOR = 32, 4
EPSILON = 1e-6  # of every LayerNorm, as in the authors' code
POOLED_STAGES = 2  # the first two stages attend on a map of half the side
LAYER_SCALE = 1e-6  # initial factor of a branch, in the other stages


class Positions(nn.Module):
    """Learned position map, one vector per place, added: (B, C, h, h) -> (B, h, h, C)."""

    no_weight_decay = {"table"}
    position_tables = {"table"}

    def __init__(self, width: int, side: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(side, side, width))
        trunc_normal(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return (x.permute(0, 2, 3, 1) + self.table).contiguous()


class Stem(nn.Module):
    """Images (B, 3, S, S) -> map (B, S/4, S/4, C)."""

    def __init__(self, width: int, image_side: int):
        super().__init__()
        self.first, self.first_norm = (
            nn.Conv2d(3, width // 2, kernel_size=3, stride=2, padding=1),
            nn.BatchNorm2d(width // 2),
        )
        self.second, self.second_norm = (
            nn.Conv2d(width // 2, width, kernel_size=3, stride=2, padding=1),
            nn.BatchNorm2d(width),
        )
        self.positions = Positions(width, image_side // 4)

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(self.first_norm(self.first(images)))
        return self.positions(self.second_norm(self.second(x)))


class Downsample(nn.Module):
    """Downsampling between stages: (B, h, h, C) -> (B, h/2, h/2, C')."""

    def __init__(self, before: int, after: int, side: int):
        super().__init__()
        self.convolve, self.norm = nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(after)
        self.positions = Positions(after, side)

    def forward(self, x: Tensor) -> Tensor:
        return self.positions(self.norm(self.convolve(x.permute(0, 3, 1, 2))))


class Attention(nn.Module):
    """Low frequencies: self-attention over the places of a map (B, C, h, h), without an output projection."""

    def __init__(self, heads: int, pooled: bool):
        super().__init__()
        self.heads, self.pooled = heads, pooled
        self.qkv = nn.Linear(heads * HEAD_SIZE, 3 * heads * HEAD_SIZE)
        self.qkv.row_splits = (heads * HEAD_SIZE,) * 3  # type: ignore[assignment]  # queries, keys, values

    def forward(self, x: Tensor) -> Tensor:
        if self.pooled:
            return F.interpolate(self.attend(F.avg_pool2d(x, 2)), scale_factor=2, mode="nearest")
        return self.attend(x)

    def attend(self, x: Tensor) -> Tensor:
        """(B, C, h, h) -> (B, C, h, h)."""
        B, C, h, _ = x.shape
        q, k, v = (
            self.qkv(x.flatten(2).transpose(1, 2)).view(B, h * h, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )  # (B, H, h h, D)
        return attend(q, k, v).transpose(2, 3).reshape(B, C, h, h)


class InceptionMixer(nn.Module):
    """Inception token mixer: channels split over convolution, max-pooling and attention, then fused; (B, h, h, C)."""

    def __init__(self, width: int, heads: int, pooled: bool):
        super().__init__()
        low = heads * HEAD_SIZE
        high = width - low
        self.split = [high // 2, high - high // 2, low]
        self.convolution = nn.Sequential(
            nn.Conv2d(high // 2, high, kernel_size=1, bias=False),
            nn.Conv2d(high, high, kernel_size=3, padding=1, groups=high, bias=False),
            nn.GELU(),
        )
        self.pooling = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1), nn.Conv2d(high // 2, high, kernel_size=1), nn.GELU()
        )
        self.attention = Attention(heads, pooled)
        self.fuse = nn.Conv2d(
            2 * high + low, 2 * high + low, kernel_size=3, padding=1, groups=2 * high + low, bias=False
        )
        self.project = nn.Conv2d(2 * high + low, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        convolved, pooled, attended = x.permute(0, 3, 1, 2).split(self.split, dim=1)
        x = torch.cat([self.convolution(convolved), self.pooling(pooled), self.attention(attended)], dim=1)
        return self.project(x + self.fuse(x)).permute(0, 2, 3, 1)


class LayerScale(nn.Module):
    """LayerScale: learned factor per channel, initially near 0 (arXiv 2103.17239)."""

    def __init__(self, width: int):
        super().__init__()
        self.factor = nn.Parameter(torch.full((width,), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Block(nn.Module):
    """Pre-norm block, (B, h, h, C) -> (B, h, h, C)."""

    def __init__(self, width: int, heads: int, pooled: bool, drop_path: float):
        super().__init__()
        self.mixer_norm = nn.LayerNorm(width, eps=EPSILON)
        self.mixer = InceptionMixer(width, heads, pooled)
        self.mixer_scale = nn.Identity() if pooled else LayerScale(width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=EPSILON)
        self.feed_forward = MLP(width, HIDDEN_FACTOR * width)
        self.feed_forward_scale = nn.Identity() if pooled else LayerScale(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer_scale(self.mixer(self.mixer_norm(x))))
        return (x + self.drop_path(self.feed_forward_scale(self.feed_forward(self.feed_forward_norm(x))))).contiguous()


class Head(nn.Module):
    """Map (B, h, h, C) -> class scores (B, K), from the mean over all places."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.classify = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.norm(x).mean(dim=(1, 2)))


def iformer(
    widths: Sequence[int], heads: Sequence[Sequence[int]], settings: ModelSettings, num_classes: int, image_side: int
) -> list[nn.Module]:
    """Return the layers of an iFormer of any size.

    Args:
        widths: C of each stage.
        heads: for each stage, the attention heads of each of its blocks.

    Raises:
        SettingsError: the image side is no multiple of 16; the pooled stages need maps of even sides.
    """
    if image_side % 16:
        raise SettingsError(
            f"model.architecture={settings.architecture} needs a multiple of 16 as image side, got {image_side}. "
            f"Set one: --set image_side={16 * max(1, round(image_side / 16))}"
        )
    rates = iter(drop_path_rates(settings.drop_path, sum(map(len, heads))))
    layers: list[nn.Module] = []
    side = image_side // 4
    for stage, (width, stage_heads) in enumerate(zip(widths, heads, strict=True)):
        if stage:
            side = (side + 1) // 2
        layers.append(Downsample(widths[stage - 1], width, side) if stage else Stem(width, image_side))
        layers += [Block(width, count, stage < POOLED_STAGES, next(rates)) for count in stage_heads]
    layers.append(Head(widths[-1], num_classes))
    for layer in layers:
        layer.apply(init_weights)
    return layers


def init_weights(module: nn.Module) -> None:
    """Initialize as the authors' code, for `apply`: truncated normal (std 0.02) for weights, zeros for biases."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        trunc_normal(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@uses_settings("drop_path")
def iformer_small(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """iFormer-S: convolution, max-pooling and attention in parallel; 19.9 M parameters (arXiv 2205.12956)."""
    heads = [[1] * 3, [3] * 3, [7] * 4 + [9] * 5, [11] * 3]
    return iformer([96, 192, 320, 384], heads, settings, num_classes, image_side)


@uses_settings("drop_path")
def iformer_base(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """iFormer-B: 30 blocks; 47.9 M parameters (arXiv 2205.12956)."""
    heads = [[1] * 4, [3] * 6, [8] * 7 + [10] * 7, [15] * 6]
    return iformer([96, 192, 384, 512], heads, settings, num_classes, image_side)


@uses_settings("drop_path")
def iformer_large(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """iFormer-L: 36 blocks; 86.6 M parameters (arXiv 2205.12956)."""
    heads = [[1] * 4, [3] * 6, [10] * 9 + [12] * 9, [19] * 8]
    return iformer([96, 192, 448, 640], heads, settings, num_classes, image_side)
