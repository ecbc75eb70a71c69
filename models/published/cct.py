"""Compact Convolutional Transformer (CCT, arXiv 2104.05704): convolutional tokenizer, sequence pooling, no CLS token.

CCT-7/3x1 has 7 blocks after one 3x3 convolution. `dropout` applies to the attention weights (published: 0.1); tokens
and MLPs have no dropout. Published `drop_path`: 0.1.

Departure from the authors' code (SHI-Labs/Compact-Transformers): weight decay does not apply to the position table;
the code decays it like the weights of linear maps and convolutions.

B images, T tokens, C width, H heads, D head size, S image side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.settings import ModelSettings
from models.attention import attend
from models.layers import MLP, DropPath, drop_path_rates, init_linear, trunc_normal, uses_settings

WIDTH, DEPTH, HEADS, HIDDEN = 256, 7, 4, 512


class Tokenizer(nn.Module):
    """Images (B, 3, S, S) -> tokens (B, T, C): 3x3 convolution, ReLU, 2x max-pooling, learned positions."""

    no_weight_decay = {"positions"}
    position_tables = {"positions"}

    def __init__(self, width: int, image_side: int):
        super().__init__()
        self.convolve = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.positions = nn.Parameter(torch.empty(((image_side + 1) // 2) ** 2, width))
        nn.init.kaiming_normal_(self.convolve.weight)
        trunc_normal(self.positions, std=0.2)  # ten times the usual value, as in the authors' code

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(F.relu(self.convolve(images)))
        return (x.flatten(2).transpose(1, 2) + self.positions).contiguous()


class Block(nn.Module):
    """CCT block, (B, T, C) -> (B, T, C). Unlike a pre-norm block, the MLP branch is added to the normalized tokens."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, drop_path: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.qkv.row_splits = (width,) * 3  # type: ignore[assignment]  # queries, keys, values
        self.project = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = MLP(width, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.drop_path(self.attend(self.attention_norm(x))))
        return x + self.drop_path(self.feed_forward(x))

    def attend(self, x: Tensor) -> Tensor:
        """Return the output of multi-head self-attention, (B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        x = attend(q, k, v, dropout=self.dropout if self.training else 0.0)
        return self.project(x.transpose(1, 2).reshape(B, T, C))


class Head(nn.Module):
    """Tokens (B, T, C) -> class scores (B, K) by sequence pooling: softmax weights from a linear map of the tokens."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.weigh = nn.Linear(width, 1)
        self.classify = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        weights = self.weigh(x).softmax(dim=1)  # (B, T, 1)
        return self.classify((weights * x).sum(dim=1))


@uses_settings("dropout", "drop_path")
def cct_7_3x1(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """CCT-7/3x1: convolutional tokenizer, 7 blocks, sequence pooling; 3.8 M parameters (arXiv 2104.05704)."""
    layers = [
        Tokenizer(WIDTH, image_side),
        *[Block(WIDTH, HEADS, HIDDEN, settings.dropout, rate) for rate in drop_path_rates(settings.drop_path, DEPTH)],
        Head(WIDTH, num_classes),
    ]
    for layer in layers:
        layer.apply(init_linear)
    return layers
