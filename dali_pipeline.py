# PYTHON_ARGCOMPLETE_OK
"""Input pipeline: batches of augmented, normalized images and labels on the device, made by NVIDIA DALI or PyTorch.

    batches = Batches(dataset, "train", batch_size=128, seed=0, augmentation=AugmentationSettings())
    for images, labels in batches.epoch(0):     # normalized float32 (B, 3, S, S); int64 (B,), or (B, K) when mixed

    python dali_pipeline.py --preview grid.png --set augmentation.policy=rand_augment      # picture of the augmentation

Three sources share one interface. `resident` reads packed pixels (from GPU memory, if the device is a GPU), and `files`
reads image files. Both feed the DALI graph of `image_data/dali_backend.py`, which is the same on a GPU and on a CPU.
`tensor` applies the same operations to whole batches in PyTorch, which is much faster than DALI on a CPU.

The sources draw no random numbers: `image_data/augmentation.py` plans the augmentation of each image. Batch k of an
epoch is therefore a function of (seed, epoch, k). It does not depend on earlier reads or on prefetching.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch and DALI are imported, so that --help and errors answer at once
    from config.command_line import run_cli
    from tools.preview_augmentation import main

    raise SystemExit(run_cli(main))

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import cache
from threading import Barrier
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.errors import DatasetError, unknown
from common.packages import is_installed
from config.catalog import SOURCES
from config.settings import AugmentationSettings, Settings
from image_data.augmentation import Augmentation
from image_data.batch_plan import BatchIndex, BatchPlanner, LoaderSpec, PlannedBatch
from image_data.dataset import Dataset, Split, too_few
from image_data.mixup import Mixer, check_partners, erase
from image_data.readers import FileReader, PackedReader, PaddedPackedReader

if TYPE_CHECKING:
    from image_data.dali_backend import DaliBackend
    from image_data.torch_backend import TorchBackend

LOGGER = logging.getLogger("engine")  # train.py shows its lines on the console
DALI = "nvidia.dali"
AHEAD = 3  # prefetched batches, finished or in progress, besides the one in use
PADDING_LABEL = -1  # label of the rows that pad the last batches of an evaluation


class Batches:
    """Batches of one split for one shard.

    Training (`augmentation` given): an epoch visits each image at most once (more often with `repeats`). The order
    depends only on (seed, epoch). Each global batch of `num_shards * batch_size` images is divided among the shards,
    and an incomplete last one is dropped. Evaluation (`augmentation` None): images come in the order of the list.
    Every shard gets the same number of full batches, and padding rows have the label -1.

    Args:
        split: "train", "validation" or "test".
        batch_size: images per batch of this shard.
        shard, num_shards: index of this shard and number of shards of each global batch.
        device: torch device; DALI runs on the same GPU, or on the CPU.
        source: one of SOURCES; "auto" uses packed pixels if there are any ("tensor" on a CPU and where DALI is not
            installed), else the files.
        image_side: side of the network's input in pixels; 0 is the side of the dataset's images.
        num_threads: CPU threads for reading and decoding.

    Raises:
        DatasetError: the split is smaller than one global batch, the source does not apply, or a file cannot be read.
        SettingsError: an augmentation setting is out of range.
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
        image_side: int = 0,
        num_threads: int = 2,
    ):
        self.split, self.dataset, self.device = dataset.splits[split], dataset, torch.device(device)
        self.batch_size, self.shard, self.num_shards, self.seed = batch_size, shard, num_shards, seed
        self.side = side_of(dataset, image_side)
        self.training = augmentation is not None
        self.source = choose_source(source, self.split, self.side == dataset.image_side, self.device)
        self.wait_seconds = 0.0  # dataloader wait of the consumer of `epoch`; the consumer resets it
        settings = augmentation or AugmentationSettings(crop_padding=0, flip=0.0)
        global_batch = batch_size * num_shards
        if self.training and len(self.split) < global_batch:
            raise too_few(split, len(self.split), global_batch)
        # Training drops an incomplete global batch; evaluation pads it.
        self._num_batches = len(self.split) // global_batch if self.training else -(-len(self.split) // global_batch)
        self._labels = torch.from_numpy(self.split.labels).to(self.device)
        reader = make_reader(
            self.source,
            dataset,
            self.split,
            self.device,
            num_threads,
            padding=settings.crop_padding if self.training and not settings.resized_crop else 0,
        )
        self._mixer = Mixer(settings, len(dataset.classes), self.side, seed)
        has_sizes = dataset.image_side is None and settings.resized_crop
        sizes_of = reader.sizes if has_sizes and isinstance(reader, FileReader) else None
        self.planner = BatchPlanner(
            len(self.split),
            batch_size,
            shard,
            num_shards,
            seed,
            Augmentation(settings, self.side, seed) if self.training else None,
            self._mixer,
            sizes_of,
        )
        spec = LoaderSpec(
            batch_size,
            self.side,
            dataset.image_side,
            dataset.mean,
            dataset.std,
            self.device,
            self.training,
            decode=self.source == "files",
            num_threads=num_threads,
        )
        self._backend = backend_class(self.source)(spec, self.planner, reader)
        # With tensor operations several batches can be in flight; DALI has its own threads.
        self._worker = single_threaded_pool(num_threads if self.source == "tensor" and self.device.type == "cpu" else 1)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._requested: deque[tuple[BatchIndex, Future]] = deque()  # requests to the worker, in order

    def __len__(self) -> int:
        """Return the number of batches per epoch, which is the same for every shard."""
        return self._num_batches

    def epoch(self, epoch: int = 0, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches `start` to `stop` (default: all) of an epoch. Skipping to `start` costs nothing."""
        stop = len(self) if stop is None else stop
        for index in range(start, stop):
            began = time.perf_counter()
            batch = self._next_ready(BatchIndex(epoch, index, stop))
            self.wait_seconds += time.perf_counter() - began
            yield batch

    def close(self) -> None:
        """Stop prefetching. A thread that still runs when the process exits can abort it."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def positions(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the positions in the split of the images of batches `start` to `stop` of an epoch: int64 (N,)."""
        return np.concatenate(
            [self.planner.plan(BatchIndex(epoch, index, stop)).positions for index in range(start, stop)]
        )

    def _next_ready(self, batch: BatchIndex) -> tuple[Tensor, Tensor]:
        """Return a finished batch and prefetch the following ones."""
        # The prefetched batches are others after a resume, or at the start of another evaluation.
        if self._requested and self._requested[0][0].key != batch.key:
            for _, future in self._requested:
                future.cancel()
            self._requested.clear()
        while len(self._requested) <= AHEAD:
            following = self._requested[-1][0].next(self.training) if self._requested else batch
            self._requested.append((following, self._worker.submit(self._produce, following)))
        images, labels, made = self._requested.popleft()[1].result()
        if made is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made)
            images.record_stream(current)
            labels.record_stream(current)
        return images, labels

    def _produce(self, batch: BatchIndex) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
        """Make a batch in the worker's thread. On a GPU also return the event after which it may be used."""
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            images, planned = self._backend.images(batch)
            labels = self._labels[torch.from_numpy(planned.readable).to(self.device, non_blocking=True)]
            if planned.positions[-1] < 0:
                labels = torch.where(torch.from_numpy(planned.positions < 0).to(self.device), PADDING_LABEL, labels)
            images, labels = self._mix_and_erase(images, labels, planned)
            return images, labels, self._stream.record_event() if self._stream is not None else None

    def _mix_and_erase(self, images: Tensor, labels: Tensor, planned: PlannedBatch) -> tuple[Tensor, Tensor]:
        """Apply random erasing, MixUp and CutMix to a batch on its device."""
        if planned.augmentation is not None and planned.augmentation.erase_boxes is not None:
            images = erase(images, planned.augmentation.erase_boxes, planned.erasing_noise)
        return self._mixer(images, labels, planned.mixing) if planned.mixing is not None else (images, labels)


def make_batches(
    dataset: Dataset,
    settings: Settings,
    data_shard: tuple[int, int],
    batch_size: int,
    seed: int,
    device: torch.device,
    source: str,
    synthetic: bool,
    closing: ExitStack,
) -> tuple[Batches | Synthetic, dict[str, Batches]]:
    """Return the training batches of a run, and the evaluation batches of every other split by name.

    Args:
        data_shard: index of this shard and number of shards of each global batch.
        batch_size: images per micro-batch of this process.
        synthetic: train on one fixed random batch.
        closing: stack that closes the batches.

    Raises:
        SettingsError: MixUp or CutMix with micro-batches of one image, which has no partner.
        DatasetError: as `Batches`.
    """
    shard, num_shards = data_shard
    common: dict[str, Any] = dict(
        batch_size=batch_size,
        shard=shard,
        num_shards=num_shards,
        device=device,
        source=source,
        image_side=settings.image_side,
    )
    check_partners(settings.augmentation, batch_size)
    batches = {"train": Batches(dataset, "train", seed=seed, augmentation=settings.augmentation, **common)}
    batches |= {name: Batches(dataset, name, **common) for name in dataset.splits if name != "train"}
    for made in batches.values():
        closing.callback(made.close)
    training = batches.pop("train")
    return Synthetic(training) if synthetic else training, batches


def make_reader(
    source: str, dataset: Dataset, split: Split, device: torch.device, num_threads: int, padding: int
) -> FileReader | PackedReader:
    """Return the reader of a source; `padding` is the padding of a random crop in pixels."""
    if source == "files":
        return FileReader([dataset.root / path for path in split.paths], num_threads, dataset.folder)
    if source == "tensor":
        return PaddedPackedReader(split.pixels(), split.rows, device, padding)
    return PackedReader(split.pixels(), split.rows, device)


def backend_class(source: str) -> Callable[..., TorchBackend | DaliBackend]:
    """Return the backend of a source. It is imported on demand, because DALI and torchvision take seconds to import."""
    if source == "tensor":
        from image_data.torch_backend import TorchBackend

        return TorchBackend
    from image_data.dali_backend import DaliBackend

    return DaliBackend


def single_threaded_pool(num_threads: int) -> ThreadPoolExecutor:
    """Return threads in which PyTorch runs each operation on a single core.

    By default PyTorch splits an operation over all cores, in any thread. For augmentation that would take cores from
    the training step, and synchronization would take longer than the work. The setting is global, but a thread keeps
    the value that it has once read. It is therefore lowered only while the new threads read it.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="batches")
    barrier = Barrier(num_threads)

    def read_setting() -> None:
        barrier.wait()  # so that each task runs in its own thread
        torch.get_num_threads()

    torch.set_num_threads(1)
    for task in [pool.submit(read_setting) for _ in range(num_threads)]:
        task.result()
    torch.set_num_threads(before)
    return pool


def side_of(dataset: Dataset, image_side: int) -> int:
    """Return the side of the network's input in pixels. Raises DatasetError if it is not determined."""
    side = image_side or dataset.image_side
    if not side:
        raise DatasetError(
            f"the images of {dataset.folder} differ in size. Add the input size of the network: --set image_side=128"
        )
    return side


def choose_source(source: str, split: Split, own_side: bool, device: torch.device) -> str:
    """Return the source to use; "auto" selects one.

    Raises:
        DatasetError: the source does not apply, or it needs DALI, which is not installed.
    """
    if source not in SOURCES:
        raise DatasetError(unknown("source", source, list(SOURCES)))
    if source == "auto":
        packed = "tensor" if device.type == "cpu" and own_side else "resident"
        source = packed if split.packed is not None else "files"
        if source == "resident" and own_side and not is_installed(DALI):
            note_missing_dali()
            return "tensor"
    if source != "tensor" and not is_installed(DALI):
        raise DatasetError(
            f"--source {source} needs NVIDIA DALI, which is not installed: pip install nvidia-dali-cuda130. Without it "
            "--source tensor works, for images that all have the size of the network's input"
        )
    if source == "tensor" and not own_side:
        raise DatasetError(
            "--source tensor does not resize images. Use --source resident or files, or remove image_side"
        )
    return source


@cache
def note_missing_dali() -> None:
    """Say once that DALI's work is done by PyTorch."""
    if os.environ.get("RANK", "0") == "0":
        LOGGER.warning("source    tensor, because NVIDIA DALI is not installed")


class Synthetic:
    """A fixed random batch in place of Batches (`--synthetic`): benchmarks training without data loading."""

    source = "synthetic"

    def __init__(self, batches: Batches):
        shape = (batches.batch_size, 3, batches.side, batches.side)
        self.images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(batches.device)
        self.labels = (torch.arange(batches.batch_size) % len(batches.dataset.classes)).to(batches.device)
        self.num_batches, self.side, self.wait_seconds = len(batches), batches.side, 0.0
        self.close = batches.close

    def __len__(self) -> int:
        return self.num_batches

    def epoch(self, epoch: int = 0, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batch as often as `Batches.epoch` yields one."""
        for _ in range(start, len(self) if stop is None else stop):
            yield self.images, self.labels
