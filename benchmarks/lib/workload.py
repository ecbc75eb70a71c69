"""The training that the benchmarks measure: an engine and its batches, built as `train.py` builds them.

Every number of processes sees the same global batches in the same order, so all of them train the same steps.
"""

from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.timing import synchronize
from config.settings import Settings
from dali_pipeline import Batches, Synthetic, side_of
from image_data.dataset import Dataset
from model import build_model
from optim.lr_schedule import Schedule
from parallel.batch_sizes import BatchSizes, EvalCounts
from parallel.engine import Engine
from parallel.strategies import engine_class

SEED = 0


@dataclass(frozen=True)
class Spent:
    """Seconds of some steps."""

    running: float
    data: float  # share of `running` spent waiting for batches


class Subject:
    """Network and dataset of a benchmark.

    Raises:
        DatasetError: fewer training images than one global batch.
    """

    def __init__(self, settings: Settings, data_dir: Path):
        self.settings, self.dataset = settings, Dataset.open(data_dir)
        self.side = side_of(self.dataset, settings.image_side)
        self.steps_per_epoch = self.dataset.steps_per_epoch(settings.engine["train_batch_size"])

    def build(self) -> nn.Module:
        """Return the untrained network."""
        return build_model(self.settings.model, len(self.dataset.classes), self.side)

    def batches(self, split: str, sizes: BatchSizes, shard: int, device: torch.device, source: str) -> Batches:
        """Return the batches of one process: shard `shard` of a split."""
        training = dict(seed=SEED, augmentation=self.settings.augmentation) if split == "train" else {}
        return Batches(
            self.dataset,
            split,
            sizes.micro,
            shard,
            sizes.shards,
            device=device,
            source=source,
            image_side=self.settings.image_side,
            **training,
        )


class Feed:
    """Endless training batches of one process, epoch after epoch as train.py makes them.

    With `synthetic`, every batch is the same random batch on the device.
    """

    def __init__(
        self,
        subject: Subject,
        sizes: BatchSizes,
        shard: int,
        device: torch.device,
        source: str = "auto",
        synthetic: bool = False,
    ):
        batches = subject.batches("train", sizes, shard, device, source)
        self.batches = Synthetic(batches) if synthetic else batches
        self._stream = self._endless(subject.steps_per_epoch * sizes.accumulation)

    def _endless(self, num_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            yield from self.batches.epoch(epoch, 0, num_batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return next(self._stream)


class Workload:
    """One engine with its training batches.

    Raises:
        SettingsError: the strategy rejects the settings.
    """

    def __init__(self, subject: Subject, source: str = "auto", total_steps: int = 1000, synthetic: bool = False):
        settings = subject.settings
        self.subject, self.source = subject, source
        self.engine: Engine = engine_class(settings.strategy)(
            subject.build, settings, Schedule(settings.schedule, total_steps), SEED
        )
        self.feed = Feed(
            subject, self.engine.batch_sizes, self.engine.data_shard[0], self.engine.device, source, synthetic
        )

    def steps(self, count: int) -> list[Tensor]:
        """Train `count` steps as the training loop does, and return the losses of this process."""
        losses = []
        for _ in range(count):
            losses.append(self.engine.train_batch(self.feed))
            self.engine.any(False)  # the training loop asks in every step whether any process wants to stop
        return losses

    def timed(self, count: int) -> tuple[Spent, list[float]]:
        """Train `count` steps as `steps`, timed until the device is done and the losses are on the host."""
        synchronize(self.engine.device)
        self.feed.batches.wait_seconds = 0.0
        began = time.perf_counter()
        losses = torch.stack(self.steps(count)).tolist()
        synchronize(self.engine.device)
        return Spent(time.perf_counter() - began, self.feed.batches.wait_seconds), losses

    def count(self) -> EvalCounts:
        """Count correct test images, as the evaluation after an epoch does. Collective."""
        engine = self.engine
        evaluation = self.subject.batches("test", engine.batch_sizes, engine.data_shard[0], engine.device, self.source)
        counts = engine.evaluate(evaluation.epoch())
        evaluation.close()
        return counts

    def close(self) -> None:
        self.feed.batches.close()
        self.engine.close()


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory_bytes(device: torch.device, before: int) -> int:
    """Return peak memory of training: PyTorch's count on a GPU, else RAM beyond `before`, the idle process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def facts_of(counts: EvalCounts) -> dict[str, Any]:
    """Return evaluation counts as a dict for JSON."""
    return {"correct": counts.correct, "seen": counts.seen, "loss": counts.loss}
