"""PyTorch backend of the `tensor` source: applies augmentation plans to whole batches of tensors.

It implements the operations of the DALI graph in `image_data/dali_backend.py` with the pixel arithmetic of
torchvision's v2 transforms. It works on whole batches because DALI's cost on a CPU is one call per image and
operator. Images are uint8 (B, 3, S, S).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from image_data.augmentation import AugmentationPlan
from image_data.auto_augment import (
    AUTOCONTRAST,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    EQUALIZE,
    IDENTITY,
    POSTERIZE,
    SHARPNESS,
    SOLARIZE,
    WARP,
    OperationBatch,
)
from image_data.batch_plan import BatchIndex, BatchPlanner, LoaderSpec, PlannedBatch
from image_data.readers import PaddedPackedReader

LUMA_WEIGHTS = (0.2989, 0.587, 0.114)  # of R, G, B, as in torchvision


class TorchBackend:
    """Makes augmented batches with PyTorch operations on whole tensors."""

    def __init__(self, spec: LoaderSpec, planner: BatchPlanner, reader: PaddedPackedReader):
        self.planner, self.reader = planner, reader
        # Computed on the CPU and copied: the first batch runs in its own CUDA stream and could overtake GPU arithmetic.
        self.mean = (255 * torch.tensor(spec.mean).view(3, 1, 1)).to(spec.device)
        self.scale = (1 / (255 * torch.tensor(spec.std).view(3, 1, 1))).to(spec.device)

    def images(self, batch: BatchIndex) -> tuple[Tensor, PlannedBatch]:
        """Return the augmented and normalized images of a batch, float32 (B, 3, S, S), and its plan."""
        planned = self.planner.plan(batch)
        plan = planned.augmentation
        images = self.reader.read_crops(planned.readable, plan.crop_offset if plan is not None else None)
        if plan is not None:
            images = augment(images, plan)
        return images.float().sub_(self.mean).mul_(self.scale), planned


def augment(images: Tensor, plan: AugmentationPlan) -> Tensor:
    """Apply a plan, except the padded crop (done by the reader) and normalization: uint8 (B, 3, S, S)."""
    if plan.crop_box is not None:
        images = resized_crop(images, plan.crop_box)
    images = flip(images, plan.flip)
    for operation in plan.operations:
        images = apply_operation(images, operation)
    return images


def flip(images: Tensor, chosen: np.ndarray) -> Tensor:
    """Flip the images horizontally where `chosen` is 1."""
    at = to_device(np.flatnonzero(chosen), images)
    return images.index_copy(0, at, images[at].flip(-1))


def to_device(array: np.ndarray, like: Tensor) -> Tensor:
    """Copy an array to the device of `like`."""
    return torch.from_numpy(array).to(like.device, non_blocking=True)


def resized_crop(images: Tensor, box: np.ndarray) -> Tensor:
    """Resize a box of each image to S x S bilinearly; boxes are y0, x0, y1, x1 relative to the sides, (B, 4)."""
    y0, x0, y1, x1 = box.T
    zero = np.zeros_like(y0)
    theta = np.stack([np.stack([x1 - x0, zero, x0 + x1 - 1], 1), np.stack([zero, y1 - y0, y0 + y1 - 1], 1)], 1)
    grid = F.affine_grid(to_device(theta, images), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).round_().to(torch.uint8)


def apply_operation(images: Tensor, operation: OperationBatch) -> Tensor:
    """Apply one operation per image; images with the same kind are processed together."""
    images = images.clone()
    for kind in np.unique(operation.kind):
        if kind != IDENTITY:
            rows = np.flatnonzero(operation.kind == kind)
            at = to_device(rows, images)
            if kind == WARP:
                images[at] = warp(images[at], to_device(operation.matrix[rows], images))
            else:
                images[at] = OPERATIONS[kind](
                    images[at], to_device(operation.magnitude[rows], images).view(-1, 1, 1, 1)
                )
    return images


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Warp images by `matrix` (B, 2, 3), output to input pixels, with nearest-neighbor sampling; black outside."""
    B, C, S, _ = images.shape
    along = torch.arange(S, device=images.device) + 0.5
    a, b, c = matrix[:, :, 0, None, None], matrix[:, :, 1, None, None], matrix[:, :, 2, None, None]
    # The small offset keeps rounding errors from deciding on which side of a pixel border a point falls.
    source = (a * along + (b * along[:, None] + (c + 1e-4))).floor_().int()  # (B, 2, S, S): x and y
    x, y = source.unbind(1)
    inside = (source >= 0) & (source < S)
    flat = torch.where(inside[:, 0] & inside[:, 1], y * S + x, S * S).view(B, 1, S * S).long()
    pixels = F.pad(images.reshape(B, C, S * S), (0, 1))
    return pixels.gather(2, flat.expand(B, C, S * S)).view(B, C, S, S)


def blend(images: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """Return factor * images + (1 - factor) * other, clipped to 0..255 and truncated to uint8."""
    return (factor * images + (1 - factor) * other).clamp_(0, 255).to(torch.uint8)


def grayscale(images: Tensor) -> Tensor:
    """Return luma, rounded down: float32 (B, 1, S, S)."""
    r, g, b = images.float().unbind(1)
    R, G, B = LUMA_WEIGHTS
    return (r * R).add_(g, alpha=G).add_(b, alpha=B).floor_().unsqueeze(1)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with a smoothed image, kernel (1 1 1; 1 5 1; 1 1 1) / 13; border pixels are unchanged."""
    kernel = images.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=torch.float32) / 13
    smooth = images.float()
    smooth[..., 1:-1, 1:-1] = F.conv2d(smooth, kernel.expand(3, 1, 3, 3), groups=3).round_()
    return blend(images, smooth, factor)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the `bits` most significant bits."""
    return images & (256 - 2 ** (8 - bits)).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert values at or above `threshold`."""
    return torch.where(images >= threshold, 255 - images, images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0..255. torchvision is imported here because the import takes a second."""
    from torchvision.transforms.v2 import functional

    return functional.autocontrast(images)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Equalize the histogram of each channel, as torchvision does."""
    from torchvision.transforms.v2 import functional

    return functional.equalize(images)


OPERATIONS = {
    BRIGHTNESS: lambda images, factor: blend(images, 0.0, factor),
    COLOR: lambda images, factor: blend(images, grayscale(images), factor),
    CONTRAST: lambda images, factor: blend(images, grayscale(images).mean(dim=(1, 2, 3), keepdim=True), factor),
    SHARPNESS: sharpness,
    POSTERIZE: posterize,
    SOLARIZE: solarize,
    AUTOCONTRAST: autocontrast,
    EQUALIZE: equalize,
}
