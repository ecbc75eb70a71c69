"""Batches of images and labels, ready on the device: NVIDIA DALI reads, decodes, augments and normalises.

    batches = Batches(dataset, "train", batch_size=128, shard=0, num_shards=1, seed=0, augmentation=AugmentationSettings())
    for images, labels in batches.epoch(0):     # float32 (B, 3, S, S), normalised; int64 (B,)

Two sources feed one graph: `resident` takes the packed pixels (on the device, when that is a GPU), `files` reads and
decodes the files of the tree. The graph is the same on a GPU and, with no GPU, on the CPU. It draws no random numbers:
`augmentation.py` plans what happens to each image, and DALI carries the plan out. So the k-th batch of an epoch is a
function of (seed, epoch, k), whatever was read before it and however far the pipeline reads ahead.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from augmentation import Augmentation, epoch_order, uniform
from dataset import Dataset, DatasetError
from settings import AugmentationSettings, unknown

SOURCES = ("auto", "resident", "files")
PREFETCH = 2  # batches in DALI's queue beyond the one in use; as many again are being prepared for it
PADDING_LABEL = -1  # of the rows that fill up the last batches of an evaluation


class Batches:
    """The batches of one split for one shard.

    Training (`augmentation` given): an epoch visits each image at most once, in an order that depends on (seed, epoch)
    alone; consecutive runs of `num_shards * batch_size` images are dealt out to the shards, the remainder is dropped.
    Evaluation (`augmentation` None): images in the order of the list, every shard gets the same number of full batches,
    and rows beyond the end carry the label -1.

    Args:
        split: "train", "validation" or "test".
        batch_size: images a batch of this shard.
        shard, num_shards: which part of each global batch is ours.
        device: torch device; DALI runs on the same GPU, or on the CPU.
        source: "resident", "files" or "auto" (resident where the dataset is packed).
        num_threads: DALI's CPU threads.

    Raises:
        DatasetError: fewer images than one global batch, an unknown source, or files that cannot be read.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        batch_size: int,
        shard: int = 0,
        num_shards: int = 1,
        seed: int = 0,
        augmentation: AugmentationSettings | None = None,
        device: torch.device | str = "cpu",
        source: str = "auto",
        num_threads: int = 2,
    ):
        if source not in SOURCES:
            raise DatasetError(unknown("source", source, list(SOURCES)))
        self.split, self.dataset, self.device = dataset.splits[split], dataset, torch.device(device)
        self.batch_size, self.shard, self.num_shards, self.seed = batch_size, shard, num_shards, seed
        self.augmentation = Augmentation(augmentation) if augmentation is not None else None
        self.source = source if source != "auto" else ("resident" if self.split.packed is not None else "files")
        self.wait_seconds = 0.0  # spent waiting for batches since the last reset, by the consumer of `epoch`
        global_batch = batch_size * num_shards
        if self.augmentation is not None and len(self.split) < global_batch:
            raise DatasetError(f"the {split} split has {len(self.split)} images, fewer than one global batch of {global_batch}; "
                               "make it smaller with --set train_batch_size=N")
        # Whole global batches in training; in evaluation the last one is filled up.
        self._num_batches = len(self.split) // global_batch if self.augmentation else -(-len(self.split) // global_batch)
        if dataset.image_side is None:
            raise DatasetError(f"the images of {dataset.folder} differ in size")
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._labels = torch.from_numpy(self.split.labels).to(self.device)
        self._reader = _Resident(self.split.pixels(), self.split.rows, self.device) if self.source == "resident" else _Files(
            [dataset.root / path for path in self.split.paths], num_threads)
        self._pipeline = _build_pipeline(self, num_threads)
        self._num_fed = 0
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._prepared: deque[tuple[Token, Future]] = deque()  # being gathered or read by the preparer
        self._scheduled: deque[tuple[Token, np.ndarray]] = deque()  # inside DALI, with the positions of their images

    def __len__(self) -> int:
        """Batches an epoch, the same for every shard."""
        return self._num_batches

    def epoch(self, epoch: int = 0, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start` to `stop` (default: all) of an epoch; at no cost that grows with `start`."""
        stop = len(self) if stop is None else stop
        for index in range(start, stop):
            began = time.perf_counter()
            batch = self._take(Token(epoch, index, stop))
            self.wait_seconds += time.perf_counter() - began
            yield batch

    def _take(self, token: Token) -> tuple[Tensor, Tensor]:
        """The batch of `token`, while the ones after it are prepared."""
        self._discard_unless_next(token)
        while len(self._scheduled) < PREFETCH:
            self._schedule_next(token)
        positions = self._scheduled.popleft()[1]
        images = self._output(positions)
        self._schedule_next(token)
        labels = self._labels[torch.from_numpy(np.maximum(positions, 0)).to(self.device)]
        if (positions < 0).any():
            labels = torch.where(torch.from_numpy(positions < 0).to(self.device), PADDING_LABEL, labels)
        return images, labels

    def _discard_unless_next(self, token: Token) -> None:
        """Forget what was read ahead when the consumer jumps: after a resume, or back to the start of an evaluation."""
        queued = [t for t, _ in self._scheduled] + [t for t, _ in self._prepared]
        if queued and queued[0].place != token.place:
            while self._scheduled:
                self._output(self._scheduled.popleft()[1])
            self._prepared.clear()

    def _schedule_next(self, current: Token) -> None:
        """Hand DALI one more batch, and let the preparer begin another."""
        while len(self._prepared) <= PREFETCH:
            queued = [t for t, _ in self._scheduled] + [t for t, _ in self._prepared]
            token = queued[-1].next(self) if queued else current
            self._prepared.append((token, self._preparer.submit(self._prepare, token)))
        token, future = self._prepared.popleft()
        positions, inputs = future.result()
        for name, value in inputs.items():
            self._pipeline.feed_input(name, value)
        self._scheduled.append((token, positions))
        self._num_fed += 1
        if self._num_fed >= PREFETCH:  # DALI's first run consumes a whole queue of inputs, every later one a single input
            self._pipeline.schedule_run()

    def _prepare(self, token: Token) -> tuple[np.ndarray, dict[str, object]]:
        """What DALI needs for one batch, and the positions of its images in the split (-1: padding)."""
        begin = (token.index * self.num_shards + self.shard) * self.batch_size
        if self.augmentation is None:
            positions = np.arange(begin, begin + self.batch_size)
            positions[positions >= len(self.split)] = -1
            return positions, {"images": self._reader.read(np.maximum(positions, 0))}
        if self._order[0] != token.epoch:
            self._order = (token.epoch, epoch_order(self.seed, token.epoch, len(self.split)))
        positions = self._order[1][begin : begin + self.batch_size]
        plan = self.augmentation.plan(uniform(self.seed, token.epoch, begin, self.batch_size))
        return positions, {"images": self._reader.read(positions), "corner": plan.corner, "flip": plan.flip}

    def _output(self, positions: np.ndarray) -> Tensor:
        """The next batch out of DALI, copied to a tensor of our own: (B, 3, S, S)."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        try:
            (output,) = self._pipeline.share_outputs()
        except RuntimeError as error:
            self._reader.blame(np.maximum(positions, 0))
            raise DatasetError(f"DALI could not make a batch: {str(error).splitlines()[0]}") from error
        S = self.dataset.image_side
        images = torch.empty(len(positions), 3, S, S, device=self.device)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        feed_ndarray(output.as_tensor(), images, cuda_stream=stream)
        self._pipeline.release_outputs()
        return images


@dataclass(frozen=True)
class Token:
    """One batch: which epoch, which place in it, and where the consumer will stop."""

    epoch: int
    index: int
    stop: int

    @property
    def place(self) -> tuple[int, int]:
        return self.epoch, self.index

    def next(self, batches: Batches) -> Token:
        """What will most likely be asked for next: the following batch, then the start of the next epoch or pass."""
        if self.index + 1 < self.stop:
            return Token(self.epoch, self.index + 1, self.stop)
        return Token(self.epoch + (batches.augmentation is not None), 0, self.stop)


class _Resident:
    """Pixels in memory; on a GPU they are gathered there."""

    def __init__(self, pixels: np.ndarray, rows: np.ndarray, device: torch.device):
        self.rows = rows
        self.pixels = torch.from_numpy(np.ascontiguousarray(pixels)).to(device) if device.type == "cuda" else pixels

    def read(self, positions: np.ndarray) -> object:
        rows = self.rows[positions]
        if isinstance(self.pixels, Tensor):
            return self.pixels[torch.from_numpy(rows).to(self.pixels.device)]
        return self.pixels[rows]

    def blame(self, positions: np.ndarray) -> None:
        """Packed pixels were checked when they were written: no file to name."""


class _Files:
    """Encoded files, read by a few threads; DALI decodes them."""

    def __init__(self, paths: list[Path], num_threads: int):
        self.paths = paths
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="files")

    def read(self, positions: np.ndarray) -> list[np.ndarray]:
        return list(self._pool.map(self._read_one, positions))

    def _read_one(self, position: int) -> np.ndarray:
        path = self.paths[position]
        try:
            encoded = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise DatasetError(f"{path} cannot be read ({error.strerror}); restore it, or run prepare_dataset.py --force") from None
        if not encoded.size:
            raise DatasetError(f"{path} is empty; restore it, or run prepare_dataset.py --force")
        return encoded

    def blame(self, positions: np.ndarray) -> None:
        """Find the file that DALI could not decode, which its message does not always name. Raises DatasetError."""
        from PIL import Image

        for position in positions:
            try:
                with Image.open(self.paths[position]) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError) as error:
                raise DatasetError(f"{self.paths[position]} is broken ({error}); restore it, or run prepare_dataset.py --force") from None


def _build_pipeline(batches: Batches, num_threads: int):
    """The graph, CPU and GPU alike, from DALI 1.34 to 2.4."""
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = batches.device.type == "cuda"
    gpu = (lambda node: node.gpu()) if on_gpu else (lambda node: node)
    S = batches.dataset.image_side

    @pipeline_def(
        batch_size=batches.batch_size,
        num_threads=num_threads,
        device_id=(batches.device.index or 0) if on_gpu else None,
        prefetch_queue_depth=PREFETCH,
        seed=0,
    )
    def graph():
        if batches.source == "resident":
            images = fn.external_source(name="images", device="gpu" if on_gpu else "cpu", layout="HWC", dtype=types.UINT8, ndim=3)
        else:
            encoded = fn.external_source(name="images", dtype=types.UINT8, ndim=1)
            images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        mirror = 0
        if batches.augmentation is not None:
            corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
            images = fn.slice(images, corner, [S, S], axes=(0, 1), normalized_anchor=False, normalized_shape=False,
                              out_of_bounds_policy="pad", fill_values=0)
            mirror = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        return fn.crop_mirror_normalize(
            gpu(images), mirror=mirror, dtype=types.FLOAT, output_layout="CHW",
            mean=[255 * m for m in batches.dataset.mean], std=[255 * s for s in batches.dataset.std],
        )

    pipeline = graph()
    pipeline.build()
    return pipeline
