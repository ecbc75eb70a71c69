"""Clocks, rounds and ratios that the benchmarks share.

The systems that are compared take turns (A B C, A B C, ...), so that a slow moment of the machine affects all of them.
A ratio is taken between two turns of the same round. CPU time is measured next to wall time: it covers the process, all
its threads and its living descendants, and other programs on the machine disturb it far less.

PyTorch is imported inside functions, so that `--help` of a benchmark answers at once.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from common.machine import cpu_name
from common.packages import is_installed
from image_data.preparation.decoding import available_cores

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# Batches at the start of a turn that the wall clock excludes. Some loaders have a few batches ready from the previous
# turn, others start from nothing; neither should count.
HEAD_BATCHES = 8
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda110",
)
SETTLE_SECONDS = 0.2  # wait after a turn: the CPU time of batches still being read ahead belongs to that turn


class Spread(NamedTuple):
    """Minimum, median and maximum over the rounds."""

    minimum: float
    median: float
    maximum: float


def spread(values: Sequence[float]) -> Spread:
    """Return minimum, median and maximum of the values."""
    return Spread(min(values), statistics.median(values), max(values))


def ratios(ours: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Return ours divided by the baseline, round by round."""
    return [a / b for a, b in zip(ours, baseline, strict=True)]


def alternate(
    turns: dict[str, Callable[[], T]], rounds: int, report: Callable[[int, str, T], None] | None = None
) -> dict[str, list[T]]:
    """Run every turn once per round, in the given order, and return the results by name, one per round."""
    results: dict[str, list[T]] = {name: [] for name in turns}
    for number in range(rounds):
        for name, turn in turns.items():
            results[name].append(turn())
            if report:
                report(number, name, results[name][-1])
    return results


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def cpu_seconds() -> float:
    """Return user plus system time so far: this process, its finished children and its living descendants.

    Without psutil, living descendants do not count: a program that has any must check `is_installed("psutil")`.
    """
    own = os.times()
    total = time.process_time() + own.children_user + own.children_system
    if not is_installed("psutil"):
        return total
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            used = child.cpu_times()
        except psutil.Error:  # the child ended between the two calls
            continue
        total += used.user + used.system
    return total


@dataclass(frozen=True)
class Window:
    """Images of one turn: `images` in total, `timed_images` of them in the `seconds` after the first batches."""

    images: int
    timed_images: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.timed_images / self.seconds


class Look:
    """Checks shape, type and device of batches, and accumulates mean and standard deviation of their pixels."""

    def __init__(self, batch_size: int, side: int, device: torch.device):
        import torch

        self.shape, self.device, self.batches = (batch_size, 3, side, side), device, 0
        self.total = self.squares = torch.zeros((), device=device)

    def at(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Add one batch. Raises ValueError for another shape, type or device."""
        import torch

        for tensor, shape, dtype in ((images, self.shape, torch.float32), (labels, self.shape[:1], torch.int64)):
            if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device.type != self.device.type:
                raise ValueError(
                    f"a loader yielded {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                    f"not {dtype} {shape} on {self.device}"
                )
        self.batches += 1
        self.total = self.total + images.mean()
        self.squares = self.squares + images.square().mean()

    @property
    def mean(self) -> float:
        return self.total.item() / self.batches

    @property
    def std(self) -> float:
        return (self.squares.item() / self.batches - self.mean**2) ** 0.5


def consume(
    epochs: Iterable[Iterable[tuple[torch.Tensor, torch.Tensor]]],
    num_batches: int,
    device: torch.device,
    look: Look | None = None,
) -> Window:
    """Iterate over all batches of the epochs, `num_batches` in total, and do nothing with them."""
    head = min(HEAD_BATCHES, num_batches // 2)
    seen = head_images = batches = 0
    began = time.perf_counter()
    for epoch in epochs:
        for images, labels in epoch:
            if look:
                look.at(images, labels)
            seen += len(images)
            batches += 1
            if batches == head:
                synchronize(device)
                began, head_images = time.perf_counter(), seen
    synchronize(device)
    seconds = time.perf_counter() - began
    if batches != num_batches:
        raise ValueError(f"a loader yielded {batches} batches, not {num_batches}")
    return Window(seen, seen - head_images, seconds)


def version_of(package: str) -> str | None:
    """Return the installed version of a package, None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine(device: torch.device | None = None, packages: Sequence[str] = PACKAGES) -> dict[str, object]:
    """Return CPU, cores, GPU and versions of the machine; without a device, of its CPU."""
    versions = {package: version_of(package) for package in packages}
    return {
        "cpu": cpu_name(),
        "cores": available_cores(),
        "gpu": _gpu_model(device) if device is not None and device.type == "cuda" else None,
        "versions": {
            "python": platform.python_version(),
            **{name: version for name, version in versions.items() if version},
        },
    }


def _gpu_model(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device)
