"""Dynamic Hybrid Vision Transformer (DHVT, arXiv 2210.05958): convolutions in patch embedding and MLP, head tokens.

DHVT-T has width 192 and 4 heads, DHVT-S 384 and 8; /4 and /2 are the patch. There is no positional embedding: the
convolutions encode position. Published `drop_path`: 0.1, no dropout.

Departures from the authors' code (ArieSeirack/DHVT):
- BatchNorm of the patch embedding is not synchronized over processes; the published runs use SyncBatchNorm;
- weight decay does not apply to the head positions and to the channel affines of the patch embedding; the code decays
  both, since they have more than one dimension there.

B images, T patch tokens, C width, H heads, D head size, F hidden size, S image side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.settings import ModelSettings
from models.attention import attend
from models.layers import DropPath, check_fixed_patch, drop_path_rates, init_linear, trunc_normal, uses_settings

DEPTH, HIDDEN_FACTOR, SQUEEZE = 12, 4, 4
EPSILON = 1e-6  # of every LayerNorm, as in the authors' code


class ChannelAffine(nn.Module):
    """Learned scale and shift per channel, (B, C, S, S) -> (B, C, S, S)."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale[:, None, None] + self.shift[:, None, None]


class OverlappingPatches(nn.Module):
    """SOPE: images (B, 3, S, S) -> CLS and patch tokens (B, 1 + T, C); each 3x3 convolution halves the side."""

    no_weight_decay = {"class_token"}

    def __init__(self, width: int, patch: int):
        super().__init__()
        halvings = patch.bit_length() - 1
        channels = [3, *(width >> i for i in reversed(range(halvings)))]
        stages: list[nn.Module] = []
        for before, after in zip(channels, channels[1:], strict=False):
            stages += [
                nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.GELU(),
            ]
        # GELU is between stages; with a single stage, the authors' code has it after that stage.
        self.stages = nn.Sequential(*(stages if halvings == 1 else stages[:-1]))
        self.before, self.after = ChannelAffine(3), ChannelAffine(width)
        self.class_token = nn.Parameter(torch.empty(1, width))
        trunc_normal(self.class_token, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        x = self.after(self.stages(self.before(images))).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1).contiguous()


class HeadTokenAttention(nn.Module):
    """HI-MHSA: self-attention with one extra token per head, made from its channels. (B, 1 + T, C) -> same."""

    no_weight_decay = {"head_positions"}

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.head_token = nn.Linear(width // heads, width)
        self.head_norm = nn.LayerNorm(width // heads)
        self.head_positions = nn.Parameter(torch.empty(heads, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv.row_splits = (width,) * 3  # type: ignore[assignment]  # queries, keys, values
        self.project = nn.Linear(width, width)
        trunc_normal(self.head_positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        means = x.mean(dim=1).view(B, self.heads, -1)  # (B, H, D)
        tokens = self.head_norm(self.head_token(means).view(B, self.heads, self.heads, -1))
        x = torch.cat([x, F.gelu(tokens).flatten(2) + self.head_positions], dim=1)
        q, k, v = self.qkv(x).view(B, T + self.heads, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T + H, D) each
        x = self.project(attend(q, k, v).transpose(1, 2).reshape(B, T + self.heads, C))
        class_token, patches, head_tokens = x.split([1, T - 1, self.heads], dim=1)
        return torch.cat([class_token + head_tokens.mean(dim=1, keepdim=True), patches], dim=1)


class DynamicAggregation(nn.Module):
    """DAFF: MLP with a depthwise 3x3 convolution and shortcut on the patch tokens. (B, 1 + T, C) -> same.

    The CLS token bypasses it. Its channels are scaled by a squeeze-and-excitation of the mean patch token.
    """

    def __init__(self, width: int, grid: int):
        super().__init__()
        self.grid, hidden = grid, HIDDEN_FACTOR * width
        self.expand, self.expand_norm = nn.Conv2d(width, hidden, kernel_size=1), nn.BatchNorm2d(hidden)
        self.mix, self.mix_norm = (
            nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden),
            nn.BatchNorm2d(hidden),
        )
        self.contract, self.contract_norm = nn.Conv2d(hidden, width, kernel_size=1), nn.BatchNorm2d(width)
        self.squeeze, self.excite = nn.Linear(width, width // SQUEEZE), nn.Linear(width // SQUEEZE, width)

    def forward(self, x: Tensor) -> Tensor:
        B, _, C = x.shape
        class_token, patches = x[:, :1], x[:, 1:]
        y = patches.transpose(1, 2).reshape(B, C, self.grid, self.grid)
        y = F.gelu(self.expand_norm(self.expand(y)))  # (B, F, grid, grid)
        y = y + F.gelu(self.mix_norm(self.mix(y)))
        y = self.contract_norm(self.contract(y)).flatten(2).transpose(1, 2)
        scale = self.excite(F.gelu(self.squeeze(y.mean(dim=1, keepdim=True))))
        return torch.cat([class_token * scale, y], dim=1)


class Block(nn.Module):
    """Pre-norm block, (B, 1 + T, C) -> (B, 1 + T, C)."""

    def __init__(self, width: int, heads: int, grid: int, drop_path: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=EPSILON)
        self.attention = HeadTokenAttention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width, eps=EPSILON)
        self.feed_forward = DynamicAggregation(width, grid)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.attention_norm(x)))
        return x + self.drop_path(self.feed_forward(self.feed_forward_norm(x)))


class Head(nn.Module):
    """Tokens (B, 1 + T, C) -> class scores (B, K), from the CLS token."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.classify = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.norm(x[:, 0]))


def dhvt(
    width: int, heads: int, patch: int, settings: ModelSettings, num_classes: int, image_side: int
) -> list[nn.Module]:
    """Return the layers of a DHVT of any size. Raises SettingsError if the patch does not divide the image side."""
    check_fixed_patch(settings, patch, image_side)
    layers = [
        OverlappingPatches(width, patch),
        *[Block(width, heads, image_side // patch, rate) for rate in drop_path_rates(settings.drop_path, DEPTH)],
        Head(width, num_classes),
    ]
    for layer in layers:
        layer.apply(init_linear)
    return layers


@uses_settings("drop_path")
def dhvt_t_4(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """DHVT-T/4: hybrid of convolution and attention, head tokens, patch 4; 6.0 M parameters (arXiv 2210.05958)."""
    return dhvt(192, 4, 4, settings, num_classes, image_side)


@uses_settings("drop_path")
def dhvt_t_2(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """DHVT-T/2: DHVT-T/4 with patch 2; 5.8 M parameters (arXiv 2210.05958)."""
    return dhvt(192, 4, 2, settings, num_classes, image_side)


@uses_settings("drop_path")
def dhvt_s_4(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """DHVT-S/4: DHVT with width 384, 8 heads, patch 4; 23.4 M parameters (arXiv 2210.05958)."""
    return dhvt(384, 8, 4, settings, num_classes, image_side)


@uses_settings("drop_path")
def dhvt_s_2(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """DHVT-S/2: DHVT with width 384, 8 heads, patch 2; 22.8 M parameters (arXiv 2210.05958)."""
    return dhvt(384, 8, 2, settings, num_classes, image_side)
