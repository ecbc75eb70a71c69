"""Which augmentation each image of an epoch gets: numbers drawn here, carried out by `dali_pipeline.py`.

Every image of every epoch owns a row of uniform numbers that depends on (seed, epoch, position in the epoch) alone: the
random stream is counter-based (Philox, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so any row is reached at
once. That makes a batch the same after a resume, for any number of shards, threads and prefetched batches, and for every
device: those who carry the plan out draw nothing themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from settings import AugmentationSettings, SettingsError

DRAWS = 8  # uniform numbers an image; a multiple of 4, because Philox makes four at a time
COLUMN = {"crop_y": 0, "crop_x": 1, "flip": 2}
_ORDER, _AUGMENTATION = 0, 1  # streams of one epoch


def uniform(seed: int, epoch: int, start: int, count: int) -> np.ndarray:
    """Rows `start` to `start + count` of the epoch's uniform numbers: float64 (count, DRAWS) in [0, 1)."""
    return (_stream(seed, epoch, _AUGMENTATION, start * DRAWS // 4).random_raw(count * DRAWS) >> 11).reshape(count, DRAWS) * 2.0**-53


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order in which an epoch visits the images: a permutation of 0..num_images-1, int64."""
    return np.argsort(_stream(seed, epoch, _ORDER, 0).random_raw(num_images), kind="stable")


def _stream(seed: int, epoch: int, stream: int, counter: int) -> np.random.Philox:
    # Raw words only: NumPy promises the words of a bit generator, not what its distributions make of them.
    return np.random.Philox(key=[seed, (epoch << 8) + stream]).advance(counter)


@dataclass(frozen=True)
class Plan:
    """What happens to each image of a batch of B; every field has B rows."""

    corner: np.ndarray  # int32 (B, 2): upper left corner (y, x) of the crop in the image, negative in the padding
    flip: np.ndarray  # int32 (B,): 1 where the image is mirrored


class Augmentation:
    """Turns rows of uniform numbers into plans, as the settings ask.

    Raises:
        SettingsError: a probability outside 0..1 or a negative size.
    """

    def __init__(self, settings: AugmentationSettings):
        if settings.crop_padding < 0:
            raise SettingsError(f"augmentation.crop_padding must not be negative, it is {settings.crop_padding}")
        if not 0 <= settings.flip <= 1:
            raise SettingsError(f"augmentation.flip is a probability between 0 and 1, not {settings.flip}")
        self.settings = settings

    def plan(self, u: np.ndarray) -> Plan:
        """`u`: float64 (B, DRAWS), from `uniform`."""
        padding = self.settings.crop_padding
        corner = np.floor(u[:, [COLUMN["crop_y"], COLUMN["crop_x"]]] * (2 * padding + 1)).astype(np.int32) - padding
        return Plan(np.ascontiguousarray(corner), (u[:, COLUMN["flip"]] < self.settings.flip).astype(np.int32))
