"""MixUp, CutMix and random erasing, applied to a finished batch on its device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import SettingsError
from config.settings import AugmentationSettings
from image_data.augmentation import MIXING, NOISE, random_stream


def erasing_noise(boxes: np.ndarray, seed: int, epoch: int, start: int) -> np.ndarray:
    """Return normal noise for every erased pixel of the images from position `start` of an epoch: float32 (N,).

    Values are ordered image by image, then channel by channel. Each position has its own random stream, so its noise
    does not depend on the number of shards.
    """
    parts = [np.empty(0, np.float32)]
    for i in np.flatnonzero(boxes.any(axis=1)):
        y0, x0, y1, x1 = boxes[i].tolist()
        draws = np.random.Generator(random_stream(seed, epoch, NOISE, (start + int(i)) << 32))
        parts.append(draws.standard_normal(3 * (y1 - y0) * (x1 - x0), dtype=np.float32))
    return np.concatenate(parts)


def erase(images: Tensor, boxes: np.ndarray, noise: np.ndarray | None) -> Tensor:
    """Fill each image's box (y0, x0, y1, x1) with `noise`, or with 0, the mean color of normalized images."""
    inside = inside_boxes(boxes, images.shape[-1], images.device)
    if noise is None:
        return torch.where(inside, 0.0, images)
    return images.masked_scatter(inside.expand_as(images), torch.from_numpy(noise).to(images.device, non_blocking=True))


def inside_boxes(boxes: np.ndarray, side: int, device: torch.device) -> Tensor:
    """Return a mask of the pixels inside each image's box: bool (B, 1, S, S)."""
    y0, x0, y1, x1 = torch.from_numpy(boxes.astype(np.int64)).to(device, non_blocking=True).t()[:, :, None, None, None]
    at = torch.arange(side, device=device)
    y, x = at[:, None], at[None, :]
    return (y >= y0) & (y < y1) & (x >= x0) & (x < x1)


@dataclass(frozen=True)
class Mixing:
    """Mixing weights and boxes of a batch of B images."""

    share: np.ndarray  # float32 (B,): weight of the image's own label and, under MixUp, of its own pixels
    boxes: np.ndarray  # int32 (B, 4): y0, x0, y1, x1 of the partner's pixels under CutMix; all 0: no box


def mixes(settings: AugmentationSettings) -> bool:
    """Return whether MixUp or CutMix is on."""
    return settings.mixup > 0 or settings.cutmix > 0


def check_partners(settings: AugmentationSettings, micro_batch: int) -> None:
    """Raise SettingsError where images are to be mixed, and those of a micro-batch have no partner."""
    if micro_batch == 1 and mixes(settings):
        raise SettingsError(
            "MixUp and CutMix mix the images of a micro-batch, and a single image has no partner. Choose --micro-batch "
            "2 or more, with a larger train_batch_size where it is needed, or --set augmentation.mixup=0 "
            "--set augmentation.cutmix=0"
        )


class Mixer:
    """MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899) with one weight and one box per image.

    The partner of image i is image B - 1 - i of the batch, so the middle image of an odd batch stays as it is. The
    weight of the image itself is drawn from Beta(alpha, alpha). CutMix replaces the rest by a box around a random
    point, with the proportions of the image. The box is clipped to the image, and the label weight counts the clipped
    box.
    """

    def __init__(self, settings: AugmentationSettings, num_classes: int, side: int, seed: int):
        self.settings, self.num_classes, self.side, self.seed = settings, num_classes, side, seed

    @property
    def is_on(self) -> bool:
        return mixes(self.settings)

    def draw(self, epoch: int, start: int, count: int) -> Mixing:
        """Draw the mixing of `count` images from position `start` of an epoch."""
        s, S = self.settings, self.side
        # Each start has its own section of the stream, because Beta consumes an unknown number of words.
        draws = np.random.Generator(random_stream(self.seed, epoch, MIXING, start << 32))
        mixed = draws.random(count) < s.mix_probability
        cut_share = s.cutmix_share if s.mixup and s.cutmix else float(s.cutmix > 0)
        cut = draws.random(count) < cut_share
        share = np.where(
            cut, draws.beta(s.cutmix or 1, s.cutmix or 1, count), draws.beta(s.mixup or 1, s.mixup or 1, count)
        )
        half = S * np.sqrt(1 - share) / 2
        center = np.floor(draws.random((2, count)) * S)
        low, high = np.clip(np.round(center - half), 0, S), np.clip(np.round(center + half), 0, S)
        box = np.where((cut & mixed)[:, None], np.stack([low[0], low[1], high[0], high[1]], axis=1), 0)
        area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
        share = np.where(cut, 1 - area / S**2, share)
        return Mixing(np.where(mixed, share, 1).astype(np.float32), box.astype(np.int32))

    def __call__(self, images: Tensor, labels: Tensor, mixing: Mixing) -> tuple[Tensor, Tensor]:
        """Mix images (B, 3, S, S) and labels (B,). Returns the mixed images and soft labels (B, K)."""
        share = torch.from_numpy(mixing.share).to(images.device, non_blocking=True)
        boxes = mixing.boxes
        partner = images.flip(0)
        is_cut = torch.from_numpy(boxes[:, 2] > boxes[:, 0]).to(images.device, non_blocking=True)
        # A CutMix image keeps its own pixels outside the box; only MixUp blends.
        weight = torch.where(is_cut, 1.0, share)[:, None, None, None]
        images = torch.where(
            inside_boxes(boxes, images.shape[-1], images.device), partner, torch.lerp(partner, images, weight)
        )
        hard = torch.nn.functional.one_hot(labels, self.num_classes).to(images.dtype)
        return images, torch.lerp(hard.flip(0), hard, share[:, None])
