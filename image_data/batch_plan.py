"""Which images are in a batch and what happens to each of them, decided before anything is read.

    planned = planner.plan(BatchIndex(epoch=0, index=7, stop=390))

A plan depends on (seed, epoch, index) alone. A reader then reads the images of a plan, a backend carries out its
augmentation, and a `Mixer` mixes the finished batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from image_data.augmentation import Augmentation, AugmentationPlan, epoch_order
from image_data.mixup import Mixer, Mixing, erasing_noise


@dataclass(frozen=True)
class BatchIndex:
    """One batch: its epoch, its index there, and the index at which the consumer will stop."""

    epoch: int
    index: int
    stop: int

    @property
    def key(self) -> tuple[int, int]:
        """What the images of the batch depend on."""
        return self.epoch, self.index

    def next(self, training: bool) -> BatchIndex:
        """The batch that will most likely be asked for next: the following one, then the first of the next epoch."""
        if self.index + 1 < self.stop:
            return BatchIndex(self.epoch, self.index + 1, self.stop)
        return BatchIndex(self.epoch + training, 0, self.stop)


@dataclass(frozen=True)
class PlannedBatch:
    """One batch of B images before they are read."""

    batch: BatchIndex
    positions: np.ndarray  # int64 (B,): positions in the split; -1 is padding
    augmentation: AugmentationPlan | None  # None: evaluation
    erasing_noise: np.ndarray | None  # float32, for the pixels of all erased boxes; None: boxes become 0
    mixing: Mixing | None

    @property
    def readable(self) -> np.ndarray:
        """`positions` with image 0 in place of padding: int64 (B,)."""
        return np.maximum(self.positions, 0)


@dataclass(frozen=True)
class LoaderSpec:
    """What a backend must know of the batches that it makes."""

    batch_size: int  # images of this process, B
    side: int  # pixels along one side of an image that the network sees, S
    source_side: int | None  # pixels along one side of all stored images; None where they differ
    mean: tuple[float, float, float]  # of each channel, in 0..1
    std: tuple[float, float, float]
    device: torch.device
    training: bool
    decode: bool  # the reader gives encoded files, not pixels
    num_threads: int


class BatchPlanner:
    """Plans the batches of one split for one shard.

    Args:
        num_images: images of the split.
        batch_size: images of a batch of this shard.
        shard, num_shards: which part of each global batch is planned here.
        seed: of the order, the augmentation and the mixing.
        augmentation: None plans an evaluation: images in order, padded at the end.
        mixer: draws MixUp and CutMix; used in training only.
        sizes_of: height and width of the images at some positions, int64 (B, 2), where they differ and a crop needs them.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        shard: int,
        num_shards: int,
        seed: int,
        augmentation: Augmentation | None,
        mixer: Mixer | None = None,
        sizes_of: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self.num_images, self.batch_size, self.shard, self.num_shards, self.seed = (
            num_images,
            batch_size,
            shard,
            num_shards,
            seed,
        )
        self.augmentation, self.mixer, self.sizes_of = augmentation, mixer, sizes_of
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def plan(self, batch: BatchIndex) -> PlannedBatch:
        """The plan of one batch."""
        begin = (batch.index * self.num_shards + self.shard) * self.batch_size
        rows = np.arange(begin, begin + self.batch_size)
        if self.augmentation is None:
            return PlannedBatch(batch, np.where(rows < self.num_images, rows, -1), None, None, None)
        settings = self.augmentation.settings
        positions = self._order_of(batch.epoch)[rows // settings.repeats]
        plan = self.augmentation.plan(
            batch.epoch, begin, self.batch_size, self.sizes_of(positions) if self.sizes_of else None, positions
        )
        noise = None
        if plan.erase_boxes is not None and settings.erasing_value == "pixel":
            noise = erasing_noise(plan.erase_boxes, self.seed, batch.epoch, begin)
        mixing = (
            self.mixer.draw(batch.epoch, begin, self.batch_size)
            if self.mixer is not None and self.mixer.is_on
            else None
        )
        return PlannedBatch(batch, positions, plan, noise, mixing)

    def _order_of(self, epoch: int) -> np.ndarray:
        order = self._order  # another thread may be at the next epoch already, and replace it
        if order[0] != epoch:
            order = self._order = (epoch, epoch_order(self.seed, epoch, self.num_images))
        return order[1]
