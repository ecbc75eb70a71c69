"""Registry of published networks. Each entry is a function (settings, number of classes, image side) -> list of layers.

Every layer maps one tensor to one tensor: stem, each block, head, as far as the network allows. The name fixes the
sizes; the attribute `used_settings` names the settings that a network still reads. To add a network, write a file here
and add a line to ARCHITECTURES. torchvision and timm are imported only when one of their networks is built.
"""

from __future__ import annotations

from config.own_parts import find_entry
from models.layers import Architecture
from models.published.cct import cct_7_3x1
from models.published.dhvt import dhvt_s_2, dhvt_s_4, dhvt_t_2, dhvt_t_4
from models.published.iformer import iformer_base, iformer_large, iformer_small
from models.published.lenet import lenet
from models.published.resnet import resnet18_cifar, resnet50
from models.published.timm_models import timm_architecture

ARCHITECTURES: dict[str, Architecture] = {
    "cct-7-3x1": cct_7_3x1,
    "dhvt-t-4": dhvt_t_4,
    "dhvt-t-2": dhvt_t_2,
    "dhvt-s-4": dhvt_s_4,
    "dhvt-s-2": dhvt_s_2,
    "iformer-small": iformer_small,
    "iformer-base": iformer_base,
    "iformer-large": iformer_large,
    "resnet50": resnet50,
    "resnet18-cifar": resnet18_cifar,
    "lenet": lenet,
}

TIMM_PREFIX = "timm:"


def get_architecture(name: str, table: dict[str, Architecture] = ARCHITECTURES) -> Architecture:
    """Return entry `name` of `table`, timm's model for `timm:NAME`, or a user-defined network.

    Raises SettingsError for an unknown name.
    """
    if name.startswith(TIMM_PREFIX):
        return timm_architecture(name.removeprefix(TIMM_PREFIX))
    return find_entry(table, "architecture", name, more_names=["timm:NAME"])
