"""Micro-batch size: images per process and forward pass, and the largest that fits into GPU memory.

    python train.py --micro-batch 64        accumulation keeps the global batch size
    python train.py --micro-batch auto      sizes are tried before training starts

Smaller micro-batches give the same gradient up to rounding, except under BatchNorm, which normalizes each micro-batch.
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
from image_data.mixup import mixes
from optim.optimizers import build_optimizer
from parallel import process_group
from parallel.engine import Engine

OutOfMemory = torch.cuda.OutOfMemoryError
SHARE = 0.9  # fraction of the free memory for a trial; engines, communication and data need the rest


class MicroBatch:
    """The micro-batch size of one run: chosen before it starts, and advised after an out-of-memory error."""

    def __init__(
        self,
        engine: type[Engine],
        settings: Settings,
        build: Callable[[], nn.Module],
        dataset: Dataset,
        source: str,
        side: int,
    ):
        self.engine, self.settings = engine, settings
        self.new_trial = lambda: Trial(build, settings, dataset, source, side, process_group.pick_device())
        self.total = settings.engine["train_batch_size"]
        self.shards = engine.num_shards(settings, int(os.environ.get("WORLD_SIZE", 1)))

    def choose(self, asked: str) -> str:
        """Set `gradient_accumulation_steps` for a micro-batch size, or for "auto". Collective.

        Returns:
            A line for the screen, empty without "auto".

        Raises:
            SettingsError: the size does not divide the global batch, or "auto" cannot be determined here.
        """
        size = self._find() if asked == "auto" else int(asked)
        self.settings.engine["gradient_accumulation_steps"] = accumulation_for(size, self.total, self.shards)
        return (
            f"micro     {size} images per micro-batch, the largest that fits into GPU memory" if asked == "auto" else ""
        )

    def _find(self) -> int:
        if not self.engine.fits_one_device:
            raise SettingsError(
                "--micro-batch auto tries the whole network on one GPU, which this strategy distributes; give a number"
            )
        if process_group.pick_device().type != "cuda":
            raise SettingsError(
                "--micro-batch auto measures GPU memory, and there is no GPU here; give a number, or leave it out"
            )
        possible = self._possible()
        found = min(process_group.all_gather_objects(self._largest(possible)))
        free_memory()
        if not found:
            raise SettingsError(no_room(possible[0], possible, None))
        return found

    def _possible(self) -> list[int]:
        """Return the sizes that may be chosen or advised: where images are mixed, one has no partner."""
        possible = sizes(self.total, self.shards)
        return possible[1:] or possible if mixes(self.settings.augmentation) else possible

    def _largest(self, possible: list[int]) -> int:
        """Return the largest size that fits on this process's GPU; 0 where not even the network and the data do."""
        try:
            return largest_that_fits(possible, self.new_trial().fits) or 0
        except OutOfMemory:
            return 0

    def advice(self) -> str:
        """Return the sentence for an out-of-memory error; call it when nothing holds the engine any more."""
        possible = self._possible()
        now = self.total // self.shards // self.settings.engine["gradient_accumulation_steps"]
        smaller = [size for size in possible if size < now]
        if not smaller:
            return no_room(now, possible, None)
        free_memory()
        try:
            if self.engine.fits_one_device:  # otherwise a trial of the whole network shows nothing
                return no_room(now, possible, largest_that_fits(smaller, self.new_trial().fits))
        except OutOfMemory:  # memory that the failed engine still holds leaves too little for the network alone
            pass
        return no_room(now, possible, smaller[-1], tried=False)


def no_room(now: int, possible: list[int], found: int | None, tried: bool = True) -> str:
    """Return the sentence for a micro-batch of `now` images that does not fit.

    Args:
        found: a smaller size; None where none fits.
        tried: whether `found` was tried and fits.
    """
    start = f"out of GPU memory with a micro-batch of {now} image{'s' * (now > 1)}"
    if found is None:
        return (
            f"{start}{', and smaller ones do not fit either' * (now > possible[0])}; choose a smaller network, "
            "--set bf16.enabled=true, or --strategy fsdp with more GPUs"
        )
    fits = f"{found} fit" if tried else f"{found} is the next smaller size"
    return (
        f"{start}; {fits}. Start the same run again with --micro-batch {found}: {possible[-1] // found} "
        "accumulation steps give the same global batch. Saved checkpoints are unchanged"
    )


def sizes(total: int, shards: int) -> list[int]:
    """Return the micro-batch sizes that divide a global batch on `shards` processes, ascending.

    Raises SettingsError.
    """
    if total % shards:
        raise SettingsError(
            f"train_batch_size={total} is not divisible by {shards} data-parallel processes; choose a multiple "
            f"of {shards}"
        )
    return [size for size in range(1, total // shards + 1) if total // shards % size == 0]


def accumulation_for(micro: int, total: int, shards: int) -> int:
    """Return the accumulation steps for micro-batches of `micro` images. Raises SettingsError where none fit."""
    possible = sizes(total, shards)
    if micro not in possible:
        near = sorted(possible, key=lambda size: abs(size - micro))[:3]
        raise SettingsError(
            f"--micro-batch {micro} does not divide a global batch of {total} on {shards} process(es); "
            f"choose {', '.join(map(str, sorted(near)))} or another divisor of {total // shards}"
        )
    return total // shards // micro


def largest_that_fits(possible: list[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest of the ascending sizes for which `fits` holds, by bisection; None when none does."""
    low, high = 0, len(possible)  # sizes below `low` fit, sizes from `high` on do not
    while low < high:
        middle = (low + high) // 2
        if fits(possible[middle]):
            low = middle + 1
        else:
            high = middle
    return possible[low - 1] if low else None


class Trial:
    """Training steps on noise, outside of any engine, to test whether they fit into memory next to the dataset."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        settings: Settings,
        dataset: Dataset,
        source: str,
        side: int,
        device: torch.device,
    ):
        self.settings, self.device, self.side, self.num_classes = settings, device, side, len(dataset.classes)
        self.model = build().to(device)
        self.optimizer = build_optimizer(settings.engine["optimizer"], self.model, fused=device.type == "cuda")
        packed = [split for split in dataset.splits.values() if split.packed is not None and source != "files"]
        self.ballast = torch.empty(sum(split.pixels().nbytes for split in packed), dtype=torch.uint8, device=device)

    def fits(self, micro: int) -> bool:
        """Whether a step on `micro` images stays within SHARE of the free memory."""
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
    """Release unreferenced memory and reset the peak statistics."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
