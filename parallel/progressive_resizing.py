"""Progressive resizing: the first steps of a run train on smaller images, which cost less (arXiv 2104.00298).

A step costs about as much less as its images have fewer pixels, so more steps fit into the same time. Images are
shrunk on the training device, after augmentation; evaluation always sees the full size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from config.settings import ResizingSettings


class ProgressiveResizing:
    """The side of the training images in every step of a run.

    Attributes:
        is_on: whether the settings ask for smaller images in any step.
    """

    def __init__(self, settings: ResizingSettings, patch: int):
        """`patch` is the side of a patch in pixels; smaller images are cut into whole patches too."""
        self.settings, self.patch = settings, patch
        self.is_on = settings.initial_scale < 1 and settings.fraction > 0

    def num_steps(self, total_steps: int) -> int:
        """Return the number of steps with smaller images in a run of `total_steps`."""
        return round(self.settings.fraction * total_steps) if self.is_on else 0

    def initial_side(self, side: int) -> int:
        """Return the side of the smaller images in pixels: a multiple of the patch, the nearest to the scale.

        It is `side` where that is the nearest one. A run whose smaller images would have it turns resizing off or is
        refused before it starts (training/resizing_check.py).
        """
        if not self.is_on:
            return side
        return min(side, max(1, round(self.settings.initial_scale * side / self.patch)) * self.patch)

    def pixel_share(self, side: int) -> float:
        """Return the pixels of a smaller image relative to a full one, about its share of the cost of a step."""
        return (self.initial_side(side) / side) ** 2

    def work(self, step: int, total_steps: int, side: int) -> float:
        """Return what the first `step` steps of a run cost, in steps with full images of this side."""
        return step - min(step, self.num_steps(total_steps)) * (1 - self.pixel_share(side))

    def resize(self, images: Tensor, step: int, total_steps: int) -> Tensor:
        """Return the images (B, 3, S, S) of a step at the side that it trains on, by bilinear antialiasing."""
        side = self.initial_side(images.shape[-1])
        if step >= self.num_steps(total_steps) or side == images.shape[-1]:
            return images
        return F.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True).to(images.dtype)
