"""Batch planning: which images a batch holds and how each is augmented, decided before any image is read.

    planned = planner.plan(BatchIndex(epoch=0, index=7, stop=390))

A plan depends only on (seed, epoch, index). A reader then reads the images, a backend applies the augmentation, and a
`Mixer` applies MixUp and CutMix to the finished batch.
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
    """Address of a batch: epoch, index in the epoch, and the index at which the consumer stops."""

    epoch: int
    index: int
    stop: int

    @property
    def key(self) -> tuple[int, int]:
        """The part of the address that determines the images."""
        return self.epoch, self.index

    def next(self, training: bool) -> BatchIndex:
        """Return the batch to prefetch: the following one, or the first of the next epoch at the end."""
        if self.index + 1 < self.stop:
            return BatchIndex(self.epoch, self.index + 1, self.stop)
        return BatchIndex(self.epoch + training, 0, self.stop)


@dataclass(frozen=True)
class PlannedBatch:
    """Plan of one batch of B images that are not read yet."""

    batch: BatchIndex
    positions: np.ndarray  # int64 (B,): positions in the split; -1 is padding
    augmentation: AugmentationPlan | None  # None: evaluation
    erasing_noise: np.ndarray | None  # float32, one value per erased pixel and channel; None: boxes become 0
    mixing: Mixing | None

    @property
    def readable(self) -> np.ndarray:
        """`positions` with padding replaced by image 0: int64 (B,)."""
        return np.maximum(self.positions, 0)


@dataclass(frozen=True)
class LoaderSpec:
    """Shapes, statistics and device of the batches that a backend makes."""

    batch_size: int  # B, images of this process
    side: int  # S, side of the network's input in pixels
    source_side: int | None  # side of the stored images in pixels; None where sizes differ
    mean: tuple[float, float, float]  # per channel, pixel values scaled to 0..1
    std: tuple[float, float, float]
    device: torch.device
    training: bool
    decode: bool  # whether the reader returns encoded files instead of pixels
    num_threads: int


class BatchPlanner:
    """Plans the batches of one split for one shard.

    Args:
        num_images: number of images in the split.
        batch_size: images per batch of this shard.
        shard, num_shards: index of this shard and number of shards of each global batch.
        seed: random seed of data order, augmentation and mixing.
        augmentation: None plans an evaluation, with images in order and padding at the end.
        mixer: draws MixUp and CutMix; used in training only.
        sizes_of: maps positions to height and width, int64 (B, 2). Needed only for random crops of images whose
            sizes differ.
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
        self.num_images, self.batch_size = num_images, batch_size
        self.shard, self.num_shards, self.seed = shard, num_shards, seed
        self.augmentation, self.mixer, self.sizes_of = augmentation, mixer, sizes_of
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def plan(self, batch: BatchIndex) -> PlannedBatch:
        """Plan one batch. The same arguments always give the same plan."""
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
        mixing = None
        if self.mixer is not None and self.mixer.is_on:
            mixing = self.mixer.draw(batch.epoch, begin, self.batch_size)
        return PlannedBatch(batch, positions, plan, noise, mixing)

    def _order_of(self, epoch: int) -> np.ndarray:
        order = self._order  # read once: another thread may replace it with the order of the next epoch
        if order[0] != epoch:
            order = self._order = (epoch, epoch_order(self.seed, epoch, self.num_images))
        return order[1]
