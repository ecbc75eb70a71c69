"""Augmentation plans: the random parameters of every image, drawn here and applied by a backend.

Each image of each epoch has its own rows of uniform numbers, which depend only on (seed, epoch, position in the epoch).
The random streams are counter-based (Philox, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so any row can be
computed directly. The backends draw no random numbers. The augmentation of an image is therefore the same after a
resume and for any number of shards, threads and prefetched batches. MixUp and CutMix (mixup.py) mix the images of a
micro-batch, so their partners and weights depend on its size, and on the number of shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.errors import SettingsError
from config.own_parts import call_by_name, find_entry
from config.settings import AugmentationSettings
from image_data.auto_augment import AutoAugment, ColorJitter, OperationBatch, RandAugment, TrivialAugment, choose

# One random stream per purpose, so that enabling one augmentation does not change the draws of the others.
ORDER, CROP, RESIZED, POLICY, JITTER, ERASING, MIXING, NOISE, PHASE = range(9)
ATTEMPTS = 10  # to draw a rectangle that fits into the image, as in torchvision
# Evaluation of images of different sizes: the shorter side is resized to this times the network's input side.
CENTER_CROP = 256 / 224


def random_stream(seed: int, epoch: int, purpose: int, counter: int = 0) -> np.random.Philox:
    """Return the stream of a purpose in an epoch, advanced by `counter` steps of four 64-bit words."""
    return np.random.Philox(key=[seed, (epoch << 8) + purpose]).advance(counter)


def uniform_rows(seed: int, epoch: int, purpose: int, start: int, count: int, columns: int) -> np.ndarray:
    """Return rows `start` to `start + count` of uniform numbers: float64 (count, columns) in [0, 1).

    `columns` must be a multiple of 4.
    """
    # NumPy guarantees the raw words of a bit generator across versions, but not the output of its distributions.
    words = random_stream(seed, epoch, purpose, start * columns // 4).random_raw(count * columns)
    return (words >> 11).reshape(count, columns) * 2.0**-53


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """Return the order in which an epoch visits the images: a permutation of 0..num_images-1, int64."""
    return np.argsort(random_stream(seed, epoch, ORDER).random_raw(num_images), kind="stable")


def flip_randomly(u: np.ndarray, probability: float, seed: int, epoch: int, images: np.ndarray) -> np.ndarray:
    """Flip each image independently in each epoch."""
    return u < probability


def flip_alternating(u: np.ndarray, probability: float, seed: int, epoch: int, images: np.ndarray) -> np.ndarray:
    """Flip each image in every second epoch, so that consecutive epochs never show the same view (airbench94)."""
    phase = random_stream(seed, 0, PHASE).random_raw(int(images.max()) + 1)[images] >> 63
    return (phase + epoch) % 2 == 1


# Arguments: uniform numbers (B,), augmentation.flip, seed, epoch, positions in the split (B,). Returns a mask (B,).
FLIPS = {"random": flip_randomly, "alternating": flip_alternating}


@dataclass(frozen=True)
class AugmentationPlan:
    """Augmentation of a batch of B images: one row per image in every array; None disables a step."""

    flip: np.ndarray  # int32 (B,): 1 where the image is flipped horizontally
    crop_offset: np.ndarray | None  # int32 (B, 2): upper left corner (y, x), negative inside the padding
    crop_box: np.ndarray | None  # float32 (B, 4): y0, x0, y1, x1 of the resized crop, relative to the sides
    operations: list[OperationBatch]  # color and geometric operations, applied in order
    erase_boxes: np.ndarray | None  # int32 (B, 4): y0, x0, y1, x1 of the erased rectangle in pixels; all 0: none


class Augmentation:
    """Draws the augmentation plans of images of `side` pixels from (seed, epoch, positions).

    Raises:
        SettingsError: a setting is out of range; the message names it.
    """

    def __init__(self, settings: AugmentationSettings, side: int, seed: int = 0):
        self.settings, self.side, self.seed = settings, side, seed
        check(settings)
        s = settings
        self.flip = find_entry(FLIPS, "augmentation.flip_mode", s.flip_mode)
        policy = make_policy(s, side)
        self.policies: list[tuple[int, Policy]] = [] if policy is None else [(POLICY, policy)]
        if s.brightness or s.contrast or s.saturation:
            self.policies.append((JITTER, ColorJitter(s.brightness, s.contrast, s.saturation)))

    def plan(
        self, epoch: int, start: int, count: int, sizes: np.ndarray | None = None, images: np.ndarray | None = None
    ) -> AugmentationPlan:
        """Plan the augmentation of positions `start` to `start + count` of an epoch.

        Args:
            images: int (count,), positions in the split of these images; None: the same as the positions in the epoch.
            sizes: int (count, 2), height and width of each image; None: all images are square.
        """
        s = self.settings

        def draw(purpose: int, columns: int) -> np.ndarray:
            return uniform_rows(self.seed, epoch, purpose, start, count, columns)

        u = draw(CROP, 4)
        images = np.arange(start, start + count) if images is None else images
        crop_offset = crop_box = None
        if s.resized_crop:
            crop_box = resized_crop_boxes(
                draw(RESIZED, 4 + 2 * ATTEMPTS), s.resized_crop_scale, s.resized_crop_ratio, sizes
            )
        elif s.crop_padding:
            crop_offset = np.ascontiguousarray(
                choose(u[:, :2], 2 * s.crop_padding + 1).astype(np.int32) - s.crop_padding
            )
        return AugmentationPlan(
            flip=self.flip(u[:, 2], s.flip, self.seed, epoch, images).astype(np.int32),
            crop_offset=crop_offset,
            crop_box=crop_box,
            operations=[
                operation
                for purpose, policy in self.policies
                for operation in policy.operations(draw(purpose, policy.num_draws))
            ],
            erase_boxes=self._erase_boxes(draw(ERASING, 4 + 2 * ATTEMPTS)) if s.erasing else None,
        )

    def _erase_boxes(self, u: np.ndarray) -> np.ndarray:
        """Random erasing (arXiv 1708.04896): use the first of ten random rectangles that fits."""
        s, S = self.settings, self.side
        height, width = rectangles(u[:, 4:], S * S, s.erasing_scale, s.erasing_ratio)
        height, width = np.round(height).astype(np.int64), np.round(width).astype(np.int64)
        fits = (height < S) & (width < S)
        first, rows = fits.argmax(axis=1), np.arange(len(u))
        height, width = height[rows, first], width[rows, first]
        y, x = choose(u[:, 1], S - height + 1), choose(u[:, 2], S - width + 1)
        box = np.stack([y, x, y + height, x + width], axis=1)
        return np.where(((u[:, 0] < s.erasing) & fits.any(axis=1))[:, None], box, 0).astype(np.int32)


def rectangles(
    u: np.ndarray, area: np.ndarray | float, scale: list[float], ratio: list[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw ten rectangles per image: first and second side, (B, 10) each, with log-uniform ratio first / second."""
    share = scale[0] + u[:, 0 : 2 * ATTEMPTS : 2] * (scale[1] - scale[0])
    log_ratio = np.log(ratio[0]) + u[:, 1 : 2 * ATTEMPTS : 2] * (np.log(ratio[1]) - np.log(ratio[0]))
    return np.sqrt(share * area * np.exp(log_ratio)), np.sqrt(share * area / np.exp(log_ratio))


def resized_crop_boxes(u: np.ndarray, scale: list[float], ratio: list[float], sizes: np.ndarray | None) -> np.ndarray:
    """Random resized crop (arXiv 1409.4842): the first of ten rectangles that fits, else a center crop.

    Returns y0, x0, y1, x1 relative to the sides of the image: float32 (B, 4).
    """
    sizes = np.ones((len(u), 2)) if sizes is None else sizes.astype(float)
    H, W = sizes[:, :1], sizes[:, 1:]
    width, height = rectangles(u[:, 4:], H * W, scale, ratio)
    fits = (width <= W) & (height <= H)
    first, rows = fits.argmax(axis=1), np.arange(len(u))
    H, W = H[:, 0], W[:, 0]
    # Without a fit (a very elongated image, or a narrow range of ratios) take the largest center crop of a valid ratio.
    aspect = np.clip(W / H, ratio[0], ratio[1])
    middle_w, middle_h = np.minimum(W, H * aspect), np.minimum(H, W / aspect)
    found = fits.any(axis=1)
    width, height = np.where(found, width[rows, first], middle_w), np.where(found, height[rows, first], middle_h)
    y = np.where(found, u[:, 0], 0.5) * (H - height)
    x = np.where(found, u[:, 1], 0.5) * (W - width)
    return np.stack([y / H, x / W, (y + height) / H, (x + width) / W], axis=1).astype(np.float32)


class Policy(Protocol):
    """A random choice of operations for every image.

    Attributes:
        num_draws: uniform numbers per image, a multiple of 4.
    """

    @property
    def num_draws(self) -> int: ...

    def operations(self, u: np.ndarray) -> list[OperationBatch]:
        """Return the operations in the order in which they are applied, from float64 (B, num_draws) in [0, 1)."""


def no_policy(settings: AugmentationSettings, side: int) -> None:
    """No operation."""


def rand_augment(settings: AugmentationSettings, side: int) -> Policy:
    """RandAugment (arXiv 1909.13719)."""
    return RandAugment(side, settings.rand_augment_ops, settings.rand_augment_magnitude)


def trivial_augment(settings: AugmentationSettings, side: int) -> Policy:
    """TrivialAugment, wide (arXiv 2103.10158)."""
    return TrivialAugment(side)


def auto_augment(settings: AugmentationSettings, side: int) -> Policy:
    """AutoAugment, the CIFAR-10 policy (arXiv 1805.09501)."""
    return AutoAugment(side)


POLICIES: dict[str, Callable[..., Policy | None]] = {
    "none": no_policy,
    "rand_augment": rand_augment,
    "trivial_augment": trivial_augment,
    "auto_augment": auto_augment,
}


def make_policy(settings: AugmentationSettings, side: int) -> Policy | None:
    """Return the policy that the settings name for images of `side` pixels. Raises SettingsError."""
    entry = find_entry(POLICIES, "augmentation.policy", settings.policy)
    return call_by_name(f"augmentation.policy={settings.policy}", entry, settings=settings, side=side)


def check(s: AugmentationSettings) -> None:
    """Check what the declared ranges of the settings do not say. Raises SettingsError."""
    find_entry(POLICIES, "augmentation.policy", s.policy)
    find_entry(FLIPS, "augmentation.flip_mode", s.flip_mode)
    if s.flip_mode == "alternating" and s.flip != AugmentationSettings().flip:
        raise SettingsError(
            f"augmentation.flip_mode=alternating does not use augmentation.flip={s.flip}. "
            f"Set augmentation.flip={AugmentationSettings().flip}, or augmentation.flip_mode=random"
        )
    if s.flip_mode == "alternating" and s.repeats > 1:
        raise SettingsError(
            f"augmentation.flip_mode=alternating would flip all {s.repeats} copies of an image alike "
            f"(augmentation.repeats={s.repeats}). Set augmentation.flip_mode=random"
        )
    for name in ("resized_crop_scale", "resized_crop_ratio", "erasing_scale", "erasing_ratio"):
        low, high = getattr(s, name)
        if low > high:
            raise SettingsError(f"augmentation.{name} must be a range [low, high] with low <= high, got {[low, high]}")
