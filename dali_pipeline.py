# PYTHON_ARGCOMPLETE_OK
"""Batches of images and labels, ready on the device: NVIDIA DALI reads, decodes, augments and normalises.

    batches = Batches(dataset, "train", batch_size=128, shard=0, num_shards=1, seed=0, augmentation=AugmentationSettings())
    for images, labels in batches.epoch(0):     # float32 (B, 3, S, S), normalised; int64 (B,), or (B, K) when mixed

    python dali_pipeline.py --preview grid.png --set augmentation.policy=rand_augment      # what the network will see

Three sources stand behind one interface. `resident` takes the packed pixels (on the device, when that is a GPU) and
`files` reads the files of the tree; both feed the DALI graph of `image_data/dali_backend.py`, which is the same on a GPU and on the
CPU. `tensor` does the same on whole batches in PyTorch: on a CPU it takes a fraction of DALI's time.

None of them draws random numbers: `image_data/augmentation.py` plans what happens to each image. So the k-th batch of an epoch is a
function of (seed, epoch, k), whatever was read before it and however far the pipeline reads ahead.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch and DALI are imported: --help and mistyped settings answer at once
    from config.command_line import run_cli
    from tools.preview_augmentation import main

    raise SystemExit(run_cli(main))

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from threading import Barrier
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.errors import DatasetError, unknown
from config.catalog import SOURCES
from config.settings import AugmentationSettings, Settings
from image_data.augmentation import Augmentation
from image_data.batch_plan import BatchIndex, BatchPlanner, LoaderSpec, PlannedBatch
from image_data.dataset import Dataset, Split, too_few
from image_data.mixup import Mixer, erase
from image_data.readers import FileReader, PackedReader, PaddedPackedReader

if TYPE_CHECKING:
    from image_data.dali_backend import DaliBackend
    from image_data.torch_backend import TorchBackend

AHEAD = 3  # batches that wait, finished or in the making, while the consumer works on one
PADDING_LABEL = -1  # of the rows that fill up the last batches of an evaluation


class Batches:
    """The batches of one split for one shard.

    Training (`augmentation` given): an epoch visits each image at most once (unless `repeats` asks for more), in an order
    that depends on (seed, epoch) alone; consecutive runs of `num_shards * batch_size` images are dealt out to the shards,
    the remainder is dropped. Evaluation (`augmentation` None): images in the order of the list, every shard gets the same
    number of full batches, and rows beyond the end carry the label -1.

    Args:
        split: "train", "validation" or "test".
        batch_size: images a batch of this shard.
        shard, num_shards: which part of each global batch is ours.
        device: torch device; DALI runs on the same GPU, or on the CPU.
        source: one of SOURCES; "auto" takes packed pixels where there are any ("tensor" on a CPU), else the files.
        image_side: pixels the network sees; 0 is the dataset's own side.
        num_threads: CPU threads for reading and decoding.

    Raises:
        DatasetError: fewer images than one global batch, a source that does not fit, or files that cannot be read.
        SettingsError: an augmentation outside its range.
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
        self.wait_seconds = 0.0  # spent by the consumer of `epoch` waiting for batches, until somebody resets it
        settings = augmentation or AugmentationSettings(crop_padding=0, flip=0.0)
        global_batch = batch_size * num_shards
        if self.training and len(self.split) < global_batch:
            raise too_few(split, len(self.split), global_batch)
        # Whole global batches in training; in evaluation the last one is filled up.
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
        sizes_of = reader.sizes if dataset.image_side is None and settings.resized_crop else None
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
        # Tensor operations make whole batches at once, so several batches can be in flight; DALI has threads of its own.
        self._worker = single_threaded_pool(num_threads if self.source == "tensor" and self.device.type == "cpu" else 1)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._requested: deque[tuple[BatchIndex, Future]] = deque()  # of the worker, in this order

    def __len__(self) -> int:
        """Batches an epoch, the same for every shard."""
        return self._num_batches

    def epoch(self, epoch: int = 0, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start` to `stop` (default: all) of an epoch; at no cost that grows with `start`."""
        stop = len(self) if stop is None else stop
        for index in range(start, stop):
            began = time.perf_counter()
            batch = self._next_ready(BatchIndex(epoch, index, stop))
            self.wait_seconds += time.perf_counter() - began
            yield batch

    def close(self) -> None:
        """Stop reading ahead. A thread that is still at work when the process ends can abort it."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def positions(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Positions in the split of the images of batches `start` to `stop` of an epoch: int64."""
        return np.concatenate(
            [self.planner.plan(BatchIndex(epoch, index, stop)).positions for index in range(start, stop)]
        )

    def _next_ready(self, batch: BatchIndex) -> tuple[Tensor, Tensor]:
        """A finished batch; the ones that will most likely follow are being made meanwhile."""
        if (
            self._requested and self._requested[0][0].key != batch.key
        ):  # after a resume, or back to the start of an evaluation
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
        """One finished batch, and on a GPU the event after which it may be used; in the worker's thread."""
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            images, planned = self._backend.images(batch)
            labels = self._labels[torch.from_numpy(planned.readable).to(self.device, non_blocking=True)]
            if planned.positions[-1] < 0:
                labels = torch.where(torch.from_numpy(planned.positions < 0).to(self.device), PADDING_LABEL, labels)
            images, labels = self._mix_and_erase(images, labels, planned)
            return images, labels, self._stream.record_event() if self._stream is not None else None

    def _mix_and_erase(self, images: Tensor, labels: Tensor, planned: PlannedBatch) -> tuple[Tensor, Tensor]:
        """What happens to a finished batch on its device."""
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
    """The training batches of a run and those of every other split, by its name; `closing` ends their threads.

    Args:
        data_shard: which of how many parts of each global batch is read here.
        batch_size: images of a micro-batch of this process.
        synthetic: train on one fixed random batch.
    """
    shard, num_shards = data_shard
    common = dict(
        batch_size=batch_size,
        shard=shard,
        num_shards=num_shards,
        device=device,
        source=source,
        image_side=settings.image_side,
    )
    batches = {"train": Batches(dataset, "train", seed=seed, augmentation=settings.augmentation, **common)}
    batches |= {name: Batches(dataset, name, **common) for name in dataset.splits if name != "train"}
    for made in batches.values():
        closing.callback(made.close)
    training = batches.pop("train")
    return Synthetic(training) if synthetic else training, batches


def make_reader(
    source: str, dataset: Dataset, split: Split, device: torch.device, num_threads: int, padding: int
) -> FileReader | PackedReader:
    """The reader of a source; `padding` is what a random crop needs on each side of an image, in pixels."""
    if source == "files":
        return FileReader([dataset.root / path for path in split.paths], num_threads)
    if source == "tensor":
        return PaddedPackedReader(split.pixels(), split.rows, device, padding)
    return PackedReader(split.pixels(), split.rows, device)


def backend_class(source: str) -> type[TorchBackend] | type[DaliBackend]:
    """Who augments the images of a source. Imported when asked for: DALI and torchvision take seconds."""
    if source == "tensor":
        from image_data.torch_backend import TorchBackend

        return TorchBackend
    from image_data.dali_backend import DaliBackend

    return DaliBackend


def single_threaded_pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads in which PyTorch's operations do not split up further.

    PyTorch splits an operation over all cores in whatever thread it is called; here that would take cores from the
    training step and spend more time waiting at the seams than working. Its setting is global, but a thread that has once
    asked for it keeps its own, so it is lowered only while the new threads ask.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="batches")
    all_here = Barrier(num_threads)

    def ask() -> None:
        all_here.wait()  # so that each task gets a thread of its own
        torch.get_num_threads()

    torch.set_num_threads(1)
    for task in [pool.submit(ask) for _ in range(num_threads)]:
        task.result()
    torch.set_num_threads(before)
    return pool


def side_of(dataset: Dataset, image_side: int) -> int:
    """Pixels the network sees. Raises DatasetError where nothing says how many."""
    side = image_side or dataset.image_side
    if not side:
        raise DatasetError(
            f"the images of {dataset.folder} differ in size; say what the network is to see with --set image_side=128"
        )
    return side


def choose_source(source: str, split: Split, own_side: bool, device: torch.device) -> str:
    """The source that "auto" means here, or the one asked for. Raises DatasetError where it cannot serve."""
    if source not in SOURCES:
        raise DatasetError(unknown("source", source, list(SOURCES)))
    if source == "auto":
        packed = "tensor" if device.type == "cpu" and own_side else "resident"
        return packed if split.packed is not None else "files"
    if source == "tensor" and not own_side:
        raise DatasetError(
            "the tensor source does not resize: use --source resident or files, or leave image_side alone"
        )
    return source


class Synthetic:
    """One fixed batch of noise, again and again, in place of Batches: the speed of everything but the data."""

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
        for _ in range(start, len(self) if stop is None else stop):
            yield self.images, self.labels
