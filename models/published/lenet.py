"""LeNet of the PyTorch and DeepSpeed CIFAR-10 tutorials, after LeNet-5 (LeCun et al., Proc. IEEE 1998).

B images, K classes, S image side.
"""

from __future__ import annotations

from torch import nn

from common.errors import SettingsError
from config.settings import ModelSettings
from models.layers import uses_settings


@uses_settings()
def lenet(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """LeNet of the DeepSpeed tutorial: two 5x5 convolutions, three linear maps; 62,006 parameters for CIFAR-10.

    Raises:
        SettingsError: the image is too small for two unpadded convolutions with pooling.
    """
    if image_side < 16:
        raise SettingsError(
            f"model.architecture=lenet needs images of at least 16 pixels, got {image_side}. Add --set image_side=32"
        )
    side = ((image_side - 4) // 2 - 4) // 2
    return [
        nn.Sequential(nn.Conv2d(3, 6, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(6, 16, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(16 * side**2, 120), nn.ReLU()),
        nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, num_classes),
    ]
