"""The micro-batch: how many images a process takes through the network at once, and the largest that its GPU has room for.

    python train.py --micro-batch 64        the global batch stays what it is, by accumulation
    python train.py --micro-batch auto      what fits is tried before training starts

Smaller micro-batches give the same gradient up to rounding, except where BatchNorm looks at a micro-batch as a whole.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import SettingsError
from config.settings import Settings
from image_data.dataset import Dataset
from optim.optimizers import build_optimizer
from parallel import process_group
from parallel.engine import Engine

OutOfMemory = torch.cuda.OutOfMemoryError
SHARE = 0.9  # of the free memory that a trial may take: engines, exchanges and data have their own needs


class MicroBatch:
    """The micro-batch of one run: chosen before it starts, and advised when its GPU turns out to be too small."""

    def __init__(
        self, engine: type[Engine], settings: Settings, build: Callable[[], nn.Module], dataset: Dataset, side: int
    ):
        self.engine, self.settings = engine, settings
        self.new_trial = lambda: Trial(build, settings, dataset, side, process_group.pick_device())
        self.total = settings.engine["train_batch_size"]
        self.shards = engine.num_shards(settings, int(os.environ.get("WORLD_SIZE", 1)))

    def choose(self, asked: str) -> str:
        """Set `gradient_accumulation_steps` so that micro-batches have the size asked for, or "auto". Returns a line for the screen. Collective.

        Raises:
            SettingsError: no such micro-batches make the global batch, or "auto" cannot find out here.
        """
        size = self._find() if asked == "auto" else int(asked)
        self.settings.engine["gradient_accumulation_steps"] = accumulation_for(size, self.total, self.shards)
        return f"micro     {size} images at once, the largest that the GPU has room for" if asked == "auto" else ""

    def _find(self) -> int:
        if not self.engine.fits_one_device:
            raise SettingsError(
                "--micro-batch auto tries the whole network on one GPU, which this strategy does not put there; give a number"
            )
        if process_group.pick_device().type != "cuda":
            raise SettingsError(
                "--micro-batch auto asks a GPU what it has room for, and there is none here; give a number, or leave it out"
            )
        possible = sizes(self.total, self.shards)
        found = min(process_group.all_gather_objects(largest_that_fits(possible, self.new_trial().fits) or 0))
        free_memory()
        if not found:
            raise SettingsError(no_room(1, possible, None))
        return found

    def advice(self) -> str:
        """The sentence for a GPU that had no room; for when nothing holds the engine any more."""
        possible = sizes(self.total, self.shards)
        now = self.total // self.shards // self.settings.engine["gradient_accumulation_steps"]
        smaller = [size for size in possible if size < now]
        free_memory()
        try:
            found = largest_that_fits(smaller, self.new_trial().fits) if smaller else None
        except OutOfMemory:  # what the failed engine has not let go leaves no room for the network alone
            found = smaller[-1] if smaller else None
        return no_room(now, possible, found)


def no_room(now: int, possible: list[int], found: int | None) -> str:
    """What to say when `now` images at once were too many, and `found` are not (None: even one is)."""
    start = f"the GPU has no room for {now} images at once"
    if found is None:
        return f"{start}, nor for fewer: take a smaller network, bf16.enabled=true, or more GPUs with zero_optimization.stage=3"
    return (
        f"{start}, but for {found}: start the same run again with --micro-batch {found}, of which {possible[-1] // found} a process make the "
        "same global batch. What was saved is untouched"
    )


def sizes(total: int, shards: int) -> list[int]:
    """The micro-batches that `shards` processes can make a global batch of `total` from, smallest first. Raises SettingsError."""
    if total % shards:
        raise SettingsError(
            f"train_batch_size={total} cannot be cut into {shards} data-parallel processes; choose a multiple of {shards}"
        )
    return [size for size in range(1, total // shards + 1) if total // shards % size == 0]


def accumulation_for(micro: int, total: int, shards: int) -> int:
    """How many micro-batches of `micro` images make a process's part of the global batch. Raises SettingsError when none do."""
    possible = sizes(total, shards)
    if micro not in possible:
        near = sorted(possible, key=lambda size: abs(size - micro))[:3]
        raise SettingsError(
            f"--micro-batch {micro}: a global batch of {total} on {shards} processes is not made of such parts; "
            f"choose {', '.join(map(str, sorted(near)))} or another divisor of {total // shards}"
        )
    return total // shards // micro


def largest_that_fits(possible: list[int], fits: Callable[[int], bool]) -> int | None:
    """The last of the ascending sizes for which `fits` holds, asked a few times; None when the first does not fit."""
    low, high = 0, len(possible)  # what is below `low` fits, what is from `high` on does not
    while low < high:
        middle = (low + high) // 2
        if fits(possible[middle]):
            low = middle + 1
        else:
            high = middle
    return possible[low - 1] if low else None


class Trial:
    """Training steps on noise, outside of any engine, to see whether they fit beside the dataset."""

    def __init__(
        self, build: Callable[[], nn.Module], settings: Settings, dataset: Dataset, side: int, device: torch.device
    ):
        self.settings, self.device, self.side, self.num_classes = settings, device, side, len(dataset.classes)
        self.model = build().to(device)
        self.optimizer = build_optimizer(settings.engine["optimizer"], self.model, fused=device.type == "cuda")
        packed = sum(split.pixels().nbytes for split in dataset.splits.values() if split.packed is not None)
        self.ballast = torch.empty(packed, dtype=torch.uint8, device=device)

    def fits(self, micro: int) -> bool:
        """Whether a step on `micro` images stays within SHARE of the memory that is free."""
        try:
            self._step(micro)
            if self.device.type != "cuda":
                return True
            free, _ = torch.cuda.mem_get_info(self.device)
            return torch.cuda.max_memory_reserved(self.device) <= SHARE * (
                free + torch.cuda.memory_reserved(self.device)
            )
        except OutOfMemory:
            return False
        finally:
            self.optimizer.zero_grad()
            free_memory()

    def _step(self, micro: int) -> None:
        images = torch.randn(micro, 3, self.side, self.side, device=self.device)
        labels = torch.arange(micro, device=self.device) % self.num_classes
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.settings.engine["bf16"]["enabled"])):
            scores = self.model(images)
        F.cross_entropy(scores.float(), labels).backward()
        self.optimizer.step()


def free_memory() -> None:
    """Give back what nothing refers to any more, and forget the highest mark."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
