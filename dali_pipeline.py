# PYTHON_ARGCOMPLETE_OK
"""Batches of images and labels, ready on the device: NVIDIA DALI reads, decodes, augments and normalises.

    batches = Batches(dataset, "train", batch_size=128, shard=0, num_shards=1, seed=0, augmentation=AugmentationSettings())
    for images, labels in batches.epoch(0):     # float32 (B, 3, S, S), normalised; int64 (B,), or (B, K) when mixed

    python dali_pipeline.py --preview grid.png --set augmentation.policy=rand_augment      # what the network will see

Three sources stand behind one interface. `resident` takes the packed pixels (on the device, when that is a GPU) and
`files` reads the files of the tree; both feed the DALI graph of `dali_graph.py`, which is the same on a GPU and on the
CPU. `tensor` does the same on whole batches in PyTorch: on a CPU it takes a fraction of DALI's time.

None of them draws random numbers: `augmentation.py` plans what happens to each image. So the k-th batch of an epoch is a
function of (seed, epoch, k), whatever was read before it and however far the pipeline reads ahead.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch and DALI are imported: --help and mistyped settings answer at once
    from command_line import in_one_sentence
    from preview import main

    raise SystemExit(in_one_sentence(main))

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from threading import Barrier

import numpy as np
import torch
from torch import Tensor

from augmentation import Augmentation, epoch_order
from carriers import OnDali, OnTensors, Token, Work
from dataset import Dataset, DatasetError, Split, too_few
from mixing import Mixing, fill_rectangles
from readers import Files, PaddedResident, Resident
from reports.images import pixels_of
from settings import AugmentationSettings, unknown

SOURCES = ("auto", "resident", "files", "tensor")
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
        self.augmentation = Augmentation(settings, self.side, seed)
        self.mixing = Mixing(settings, len(dataset.classes), self.side, seed)
        global_batch = batch_size * num_shards
        if self.training and len(self.split) < global_batch:
            raise too_few(split, len(self.split), global_batch)
        # Whole global batches in training; in evaluation the last one is filled up.
        self._num_batches = len(self.split) // global_batch if self.training else -(-len(self.split) // global_batch)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._labels = torch.from_numpy(self.split.labels).to(self.device)
        if self.source == "files":
            self.reader: Files | Resident = Files([dataset.root / path for path in self.split.paths], num_threads)
        elif self.source == "tensor":
            padding = settings.crop_padding if self.training and not settings.resized_crop else 0
            self.reader = PaddedResident(self.split.pixels(), self.split.rows, self.device, padding)
        else:
            self.reader = Resident(self.split.pixels(), self.split.rows, self.device)
        self._carrier = (OnTensors if self.source == "tensor" else OnDali)(self, num_threads)
        # Tensor operations make whole batches at once, so several batches can be in the making; DALI has threads of its own.
        self._worker = single_threaded_pool(num_threads if self.source == "tensor" and self.device.type == "cpu" else 1)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._asked: deque[tuple[Token, Future]] = deque()  # of the worker, in this order

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

    def close(self) -> None:
        """Stop reading ahead. A thread that is still at work when the process ends can abort it."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _take(self, token: Token) -> tuple[Tensor, Tensor]:
        """The batch of `token`; the ones that will most likely follow are being made meanwhile."""
        if self._asked and self._asked[0][0].place != token.place:  # after a resume, or back to the start of an evaluation
            for _, future in self._asked:
                future.cancel()
            self._asked.clear()
        while len(self._asked) <= AHEAD:
            following = self._asked[-1][0].next(self.training) if self._asked else token
            self._asked.append((following, self._worker.submit(self._make, following)))
        images, labels, made = self._asked.popleft()[1].result()
        if made is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(made)
            images.record_stream(current)
            labels.record_stream(current)
        return images, labels

    def _make(self, token: Token) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
        """One finished batch, and on a GPU the event after which it may be used; in the worker's thread."""
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            images, work = self._carrier.images(token)
            positions = work.positions
            labels = self._labels[torch.from_numpy(np.maximum(positions, 0)).to(self.device, non_blocking=True)]
            if positions[-1] < 0:
                labels = torch.where(torch.from_numpy(positions < 0).to(self.device), PADDING_LABEL, labels)
            images, labels = self._finish(images, labels, work)
            return images, labels, self._stream.record_event() if self._stream is not None else None

    def _finish(self, images: Tensor, labels: Tensor, work: Work) -> tuple[Tensor, Tensor]:
        """What is done on the batch on its device."""
        plan, settings = work.plan, self.augmentation.settings
        if plan is not None and plan.erased is not None and (settings.erasing_value == "pixel" or self.source == "tensor"):
            noise = None
            if settings.erasing_value == "pixel":
                begin = work.token.index * self.num_shards + self.shard
                noise = torch.Generator(self.device).manual_seed(hash((self.seed, work.token.epoch, begin)) & (2**63 - 1))
            images = fill_rectangles(images, plan.erased, noise)
        return self.mixing(images, labels, work.mix) if work.mix is not None else (images, labels)

    def prepare(self, token: Token, read: bool) -> Work:
        """Plan what happens to the images of one batch and, if asked to, read them."""
        begin = (token.index * self.num_shards + self.shard) * self.batch_size
        if not self.training:
            positions = np.arange(begin, begin + self.batch_size)
            positions[positions >= len(self.split)] = -1
            return Work(token, positions, self.reader.read(np.maximum(positions, 0)) if read else None, None, None)
        order = self._order  # another thread may be at the next epoch already, and replace it
        if order[0] != token.epoch:
            order = self._order = (token.epoch, epoch_order(self.seed, token.epoch, len(self.split)))
        repeats = self.augmentation.settings.repeats
        positions = order[1][np.arange(begin, begin + self.batch_size) // repeats]
        sizes = self.reader.sizes(positions) if self.dataset.image_side is None and self.augmentation.settings.resized_crop else None
        plan = self.augmentation.plan(token.epoch, begin, self.batch_size, sizes, positions)
        mix = self.mixing.draw(token.epoch, begin, self.batch_size) if self.mixing.is_on else None
        return Work(token, positions, self.reader.read(positions) if read else None, plan, mix)

    def blame(self, work: Work, error: RuntimeError) -> None:
        """Say which file a batch failed on. Raises DatasetError."""
        self.reader.blame(np.maximum(work.positions, 0))
        raise DatasetError(f"a batch could not be made: {str(error).splitlines()[0]}") from error


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
        raise DatasetError(f"the images of {dataset.folder} differ in size; say what the network is to see with --set image_side=128")
    return side


def choose_source(source: str, split: Split, own_side: bool, device: torch.device) -> str:
    """The source that "auto" means here, or the one asked for. Raises DatasetError where it cannot serve."""
    if source not in SOURCES:
        raise DatasetError(unknown("source", source, list(SOURCES)))
    if source == "auto":
        packed = "tensor" if device.type == "cpu" and own_side else "resident"
        return packed if split.packed is not None else "files"
    if source == "tensor" and not own_side:
        raise DatasetError("the tensor source does not resize: use --source resident or files, or leave image_side alone")
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


def preview(dataset: Dataset, augmentation: AugmentationSettings, image_side: int, count: int, epochs: int, seed: int, source: str) -> np.ndarray:
    """A grid of uint8 pixels (rows, columns, S, S, 3): `count` images, each as it is and as `epochs` epochs show it."""
    train = dataset.splits["train"]
    rows = np.linspace(0, len(train) - 1, count).astype(np.int64)
    few = replace(dataset, splits={"train": train.take(rows)})
    common = dict(batch_size=count, source=source, image_side=image_side)
    columns = [next(iter(Batches(few, "train", **common).epoch()))[0]]
    training = Batches(few, "train", seed=seed, augmentation=replace(augmentation, repeats=1), **common)
    for epoch in range(epochs):
        images = next(iter(training.epoch(epoch)))[0]
        columns.append(images[torch.from_numpy(np.argsort(epoch_order(seed, epoch, count)))])
    return pixels_of(torch.stack(columns, dim=1), dataset.mean, dataset.std)
