"""A tiny network for tests of parts, with images and tokens that are the same each time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from config.settings import ModelSettings
from model import build_model
from models.parts import Dimensions

TINY = ModelSettings(patch=4, width=16, depth=2, heads=2, head_size=8, feed_forward_options={}, dropout=0.0)
CLASSES, SIDE = 5, 16


def dimensions(**changes) -> Dimensions:
    """Dimensions of the tiny network, with changes."""
    dims = Dimensions(CLASSES, SIDE, patch=4, width=16, depth=2, heads=2, head_size=8, num_prefix=1, dropout=0.0)
    return replace(dims, **changes)


def tiny(**changes) -> nn.Sequential:
    """The tiny network with changed settings and the same weights each time."""
    torch.manual_seed(0)
    return build_model(replace(TINY, **changes), CLASSES, SIDE)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def tokens(count: int = 3, num_tokens: int = 17) -> Tensor:
    return torch.randn(count, num_tokens, 16, generator=torch.Generator().manual_seed(2))
