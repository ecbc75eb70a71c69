"""Pixels of normalized images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def denormalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Convert normalized images (..., 3, S, S) to displayable pixels: uint8 (..., S, S, 3)."""
    shift, scale = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
    pixels = (images.float().cpu() * scale + shift).mul(255).round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(-3, -1).numpy()
