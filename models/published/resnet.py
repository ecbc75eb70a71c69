"""Residual networks (arXiv 1512.03385) from torchvision: ResNet-50, and ResNet-18 with a stem for 32-pixel images.

The layers are torchvision's own modules, split into stem, blocks and head. `name_prefixes` of each layer maps their
names to those of torchvision, so that torchvision's weight files load (see `models/initial_weights.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

from common.errors import SettingsError
from config.settings import ModelSettings
from models.layers import uses_settings

if TYPE_CHECKING:
    from torchvision.models import ResNet


def to_layers(network: ResNet) -> list[nn.Module]:
    """Return a torchvision ResNet as a list of layers: stem, blocks, head."""
    stem = nn.Sequential(OrderedDict((name, getattr(network, name)) for name in ("conv1", "bn1", "relu", "maxpool")))
    head = nn.Sequential(OrderedDict(avgpool=network.avgpool, flatten=nn.Flatten(), fc=network.fc))
    named = [("", stem)]
    for group in ("layer1", "layer2", "layer3", "layer4"):
        named += [(f"{group}.{name}.", block) for name, block in getattr(network, group).named_children()]
    named.append(("", head))
    for prefix, layer in named:
        # our tensors "<name>" are torchvision's "<prefix><name>"
        layer.name_prefixes = ("", prefix)  # type: ignore[assignment]  # modules take any attribute
    return [layer for _, layer in named]


def torchvision_models() -> ModuleType:
    """Import torchvision.models when a network needs it. Raises SettingsError if it cannot be imported."""
    try:
        from torchvision import models
    except ImportError as error:
        raise SettingsError(
            f"the ResNets need torchvision, which cannot be imported ({error}): pip install torchvision"
        ) from error
    return models


@uses_settings()
def resnet50(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """ResNet-50 of torchvision, for 224 pixels; 25.6 M parameters with 1000 classes (arXiv 1512.03385)."""
    return to_layers(torchvision_models().resnet50(weights=None, num_classes=num_classes))


@uses_settings()
def resnet18_cifar(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """ResNet-18 of torchvision with a 3x3 stride-1 stem, no max-pooling; 11.2 M parameters (arXiv 1512.03385)."""
    network = torchvision_models().resnet18(weights=None, num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    # as torchvision initializes its own
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return to_layers(network)
