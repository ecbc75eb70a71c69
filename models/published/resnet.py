"""Residual networks (arXiv 1512.03385) from torchvision: ResNet-50 as it is, ResNet-18 with the stem that suits 32-pixel images.

The layers are torchvision's own modules, cut into stem, blocks and head. `name_prefixes` on each layer says how
torchvision names its tensors, so that its weight files load (see `models/initial_weights.py`).
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


def in_layers(network: ResNet) -> list[nn.Module]:
    """A torchvision ResNet as a list: stem, one layer a block, head."""
    stem = nn.Sequential(OrderedDict((name, getattr(network, name)) for name in ("conv1", "bn1", "relu", "maxpool")))
    head = nn.Sequential(OrderedDict(avgpool=network.avgpool, flatten=nn.Flatten(), fc=network.fc))
    named = [("", stem)]
    for group in ("layer1", "layer2", "layer3", "layer4"):
        named += [(f"{group}.{name}.", block) for name, block in getattr(network, group).named_children()]
    named.append(("", head))
    for prefix, layer in named:
        layer.name_prefixes = ("", prefix)  # our tensors "<name>" are torchvision's "<prefix><name>"
    return [layer for _, layer in named]


def torchvision_models() -> ModuleType:
    """The module torchvision.models, imported when a network needs it. Raises SettingsError when it is not installed."""
    try:
        from torchvision import models
    except ImportError as error:
        raise SettingsError(
            f"the ResNets come from torchvision, which cannot be imported ({error}): pip install torchvision"
        ) from error
    return models


@uses_settings()
def resnet50(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """ResNet-50 of torchvision, made for 224 pixels; 25.6 M parameters at 1000 classes (arXiv 1512.03385)."""
    return in_layers(torchvision_models().resnet50(weights=None, num_classes=num_classes))


@uses_settings()
def resnet18_cifar(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """ResNet-18 of torchvision with a 3x3 stem that keeps the side, no max-pooling; 11.2 M parameters (arXiv 1512.03385)."""
    network = torchvision_models().resnet18(weights=None, num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision starts its own
    network.maxpool = nn.Identity()
    return in_layers(network)
