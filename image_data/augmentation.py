"""Which augmentation each image of an epoch gets: numbers drawn here, carried out by DALI or on whole tensors.

Every image of every epoch owns rows of uniform numbers that depend on (seed, epoch, position in the epoch) alone: the
random streams are counter-based (Philox, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so any row is reached
at once. That makes a batch the same after a resume, for any number of shards, threads and prefetched batches: those who
carry the plan out draw nothing themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.errors import SettingsError, unknown
from config.settings import AugmentationSettings
from image_data.auto_augment import AutoAugment, ColorJitter, OperationBatch, RandAugment, TrivialAugment, choose

POLICIES = ("none", "rand_augment", "trivial_augment", "auto_augment")
# One stream of random numbers for each purpose, so that switching one augmentation on leaves the others' draws alone.
ORDER, CROP, RESIZED, POLICY, JITTER, ERASING, MIXING, NOISE, PHASE = range(9)
ATTEMPTS = 10  # at a random rectangle that fits, as in torchvision
CENTRE_CROP = (
    256 / 224
)  # evaluation of images of any size: the shorter side is resized to this times the side asked for


def random_stream(seed: int, epoch: int, purpose: int, counter: int = 0) -> np.random.Philox:
    """The random stream of one purpose in one epoch, `counter` steps (of four 64-bit words) from its start."""
    return np.random.Philox(key=[seed, (epoch << 8) + purpose]).advance(counter)


def uniform_rows(seed: int, epoch: int, purpose: int, start: int, count: int, columns: int) -> np.ndarray:
    """Rows `start` to `start + count` of uniform numbers: float64 (count, columns) in [0, 1); columns a multiple of 4."""
    # Raw words only: NumPy promises the words of a bit generator, not what its distributions make of them.
    words = random_stream(seed, epoch, purpose, start * columns // 4).random_raw(count * columns)
    return (words >> 11).reshape(count, columns) * 2.0**-53


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order in which an epoch visits the images: a permutation of 0..num_images-1, int64."""
    return np.argsort(random_stream(seed, epoch, ORDER).random_raw(num_images), kind="stable")


def flip_randomly(u: np.ndarray, probability: float, seed: int, epoch: int, images: np.ndarray) -> np.ndarray:
    """Each time anew."""
    return u < probability


def flip_alternating(u: np.ndarray, probability: float, seed: int, epoch: int, images: np.ndarray) -> np.ndarray:
    """Each image in every second epoch, so that no two epochs in a row show it the same way (airbench94)."""
    phase = random_stream(seed, 0, PHASE).random_raw(int(images.max()) + 1)[images] >> 63
    return (phase + epoch) % 2 == 1


# Uniform numbers (B,), augmentation.flip, seed, epoch, which images of the split (B,) -> whether each is mirrored.
FLIPS = {"random": flip_randomly, "alternating": flip_alternating}


@dataclass(frozen=True)
class AugmentationPlan:
    """What happens to each image of a batch of B; every array has B rows. None: not at all."""

    flip: np.ndarray  # int32 (B,): 1 where the image is mirrored
    crop_offset: np.ndarray | None  # int32 (B, 2): upper left corner (y, x) of the crop, negative in the padding
    crop_box: np.ndarray | None  # float32 (B, 4): y0, x0, y1, x1 of the part to resize, as shares of the image's sides
    operations: list[OperationBatch]  # operations on colours and shapes, one after the other
    erase_boxes: (
        np.ndarray | None
    )  # int32 (B, 4): y0, x0, y1, x1 of the erased rectangle, pixels; all 0 where there is none


class Augmentation:
    """Turns (seed, epoch, positions) into plans, as the settings ask, for images of `side` pixels.

    Raises:
        SettingsError: a setting outside its range, by name.
    """

    def __init__(self, settings: AugmentationSettings, side: int, seed: int = 0):
        self.settings, self.side, self.seed = settings, side, seed
        check(settings)
        s = settings
        self.policies = [(POLICY, policy) for policy in (_policy(s, side),) if policy]
        if s.brightness or s.contrast or s.saturation:
            self.policies.append((JITTER, ColorJitter(s.brightness, s.contrast, s.saturation)))

    @property
    def num_operations(self) -> int:
        return len(self.plan(0, 0, 1).operations)

    def plan(
        self, epoch: int, start: int, count: int, sizes: np.ndarray | None = None, images: np.ndarray | None = None
    ) -> AugmentationPlan:
        """The plan of positions `start` to `start + count` of an epoch.

        Args:
            images: int (count,), which images of the split these are; None: those at the positions.
            sizes: int (count, 2), height and width of each image, where they differ; else all are `side`.
        """
        s = self.settings

        def draw(purpose: int, columns: int) -> np.ndarray:
            return uniform_rows(self.seed, epoch, purpose, start, count, columns)

        u = draw(CROP, 4)
        images = np.arange(start, start + count) if images is None else images
        crop_offset = crop_box = None
        if s.resized_crop:
            crop_box = resized_part(draw(RESIZED, 4 + 2 * ATTEMPTS), s.resized_crop_scale, s.resized_crop_ratio, sizes)
        elif s.crop_padding:
            crop_offset = np.ascontiguousarray(
                choose(u[:, :2], 2 * s.crop_padding + 1).astype(np.int32) - s.crop_padding
            )
        return AugmentationPlan(
            flip=FLIPS[s.flip_mode](u[:, 2], s.flip, self.seed, epoch, images).astype(np.int32),
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
        """Random erasing (arXiv 1708.04896): the first of ten rectangles that fits."""
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
    """Ten random rectangles an image: the first side and the second, with first / second = ratio, log-uniform."""
    share = scale[0] + u[:, 0 : 2 * ATTEMPTS : 2] * (scale[1] - scale[0])
    log_ratio = np.log(ratio[0]) + u[:, 1 : 2 * ATTEMPTS : 2] * (np.log(ratio[1]) - np.log(ratio[0]))
    return np.sqrt(share * area * np.exp(log_ratio)), np.sqrt(share * area / np.exp(log_ratio))


def resized_part(u: np.ndarray, scale: list[float], ratio: list[float], sizes: np.ndarray | None) -> np.ndarray:
    """Random resized crop (arXiv 1409.4842): the first of ten rectangles that fits, else the middle; float32 (B, 4)."""
    H, W = (
        (np.ones((len(u), 1)), np.ones((len(u), 1)))
        if sizes is None
        else (sizes[:, :1].astype(float), sizes[:, 1:].astype(float))
    )
    width, height = rectangles(u[:, 4:], H * W, scale, ratio)
    fits = (width <= W) & (height <= H)
    first, rows = fits.argmax(axis=1), np.arange(len(u))
    H, W = H[:, 0], W[:, 0]
    # Nothing fits only where the image is far longer than wide, or the settings ask for it: take the largest middle part.
    aspect = np.clip(W / H, ratio[0], ratio[1])
    middle_w, middle_h = np.minimum(W, H * aspect), np.minimum(H, W / aspect)
    found = fits.any(axis=1)
    width, height = np.where(found, width[rows, first], middle_w), np.where(found, height[rows, first], middle_h)
    y = np.where(found, u[:, 0], 0.5) * (H - height)
    x = np.where(found, u[:, 1], 0.5) * (W - width)
    return np.stack([y / H, x / W, (y + height) / H, (x + width) / W], axis=1).astype(np.float32)


def _policy(s: AugmentationSettings, side: int) -> RandAugment | TrivialAugment | AutoAugment | None:
    makers = {
        "none": lambda: None,
        "rand_augment": lambda: RandAugment(side, s.rand_augment_ops, s.rand_augment_magnitude),
        "trivial_augment": lambda: TrivialAugment(side),
        "auto_augment": lambda: AutoAugment(side),
    }
    return makers[s.policy]()


def check(s: AugmentationSettings) -> None:
    """Refuse settings outside their range. Raises SettingsError."""
    if s.policy not in POLICIES:
        raise SettingsError(unknown("augmentation.policy", s.policy, list(POLICIES)))
    if s.flip_mode not in FLIPS:
        raise SettingsError(unknown("augmentation.flip_mode", s.flip_mode, list(FLIPS)))
    if s.flip_mode == "alternating" and s.flip != AugmentationSettings().flip:
        raise SettingsError(
            f"augmentation.flip_mode=alternating would not use augmentation.flip={s.flip}; flip_mode=random would"
        )
    if s.erasing_value not in ("zero", "pixel"):
        raise SettingsError(unknown("augmentation.erasing_value", s.erasing_value, ["zero", "pixel"]))
    for name in ("flip", "erasing", "mix_probability", "cutmix_share"):
        if not 0 <= getattr(s, name) <= 1:
            raise SettingsError(f"augmentation.{name} is a probability between 0 and 1, not {getattr(s, name)}")
    for name in ("crop_padding", "brightness", "contrast", "saturation", "mixup", "cutmix"):
        if getattr(s, name) < 0:
            raise SettingsError(f"augmentation.{name} must not be negative, it is {getattr(s, name)}")
    if not (0 <= s.rand_augment_magnitude <= 30 and s.rand_augment_ops >= 1 and s.repeats >= 1):
        raise SettingsError(
            "augmentation.rand_augment_magnitude lies between 0 and 30, rand_augment_ops and repeats are at least 1"
        )
    for name, top in (
        ("resized_crop_scale", 1.0),
        ("resized_crop_ratio", np.inf),
        ("erasing_scale", 1.0),
        ("erasing_ratio", np.inf),
    ):
        values = getattr(s, name)
        if len(values) != 2 or not 0 < values[0] <= values[1] <= top:
            raise SettingsError(f"augmentation.{name} is a range [low, high] of positive numbers, not {values}")
