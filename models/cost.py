"""What a network costs: parameters, and FLOPs of one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.errors import SettingsError


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Cost:
    """What a network costs, whatever machine it runs on."""

    parameters: int
    flops: int  # of one image's forward pass; a multiply-add counts as 2


def count_flops(model: Any, image_side: int, device: str) -> int:
    """FLOPs of one image's forward pass as PyTorch counts them, a multiply-add as 2; attention in its plain form.

    Raises:
        SettingsError: this PyTorch is older than 2.3 and cannot count them.
    """
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode
    except ImportError:
        raise SettingsError(
            f"FLOPs cannot be counted with PyTorch {torch.__version__}; install 2.3 or newer "
            "(environment/requirements-cuda12.txt or requirements.txt)"
        ) from None
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(1, 3, image_side, image_side, device=device))
    return counter.get_total_flops()
