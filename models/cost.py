"""Cost of a network: trainable parameters and FLOPs per image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.errors import SettingsError


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Cost:
    """Cost of a network, independent of the machine."""

    parameters: int
    flops: int  # forward pass of one image; a multiply-add counts as 2


def count_flops(model: Any, image_side: int, device: str) -> int:
    """Return the FLOPs of the forward pass of one image, counted by PyTorch; a multiply-add counts as 2.

    Attention runs as plain matrix products, because the counter does not see into fused kernels.

    Raises:
        SettingsError: PyTorch is older than 2.3 and cannot count FLOPs.
    """
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode
    except ImportError:
        raise SettingsError(
            f"FLOPs cannot be counted with PyTorch {torch.__version__}. Install 2.3 or newer "
            "(environment/requirements-cuda12.txt or requirements.txt)"
        ) from None
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(1, 3, image_side, image_side, device=device))
    return counter.get_total_flops()
