"""Steps with a non-finite loss or gradient: detected without synchronizing every step, reported with their images.

Losses and gradient norms stay on the device and are read twice a second and before every checkpoint, so no checkpoint
holds a state after a bad step. The images of a step follow from (seed, epoch, step).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import RunError
from common.files import write_atomically
from common.paths import near_path
from dali_pipeline import Batches, Synthetic
from parallel.engine import Engine
from records.run_folder import Progress

MAX_CONSECUTIVE_SKIPS = 10  # skipped steps in a row that end the run: the run has diverged
HINT = "A lower optimizer.params.lr or a longer schedule.warmup_fraction usually helps"


class NonFiniteLoss(RunError):
    """A loss or a gradient became infinite or NaN, raised on all processes; the main process names step and images."""


@dataclass(frozen=True)
class NonFiniteStep:
    """What one process knows of a bad step."""

    step: int
    index: int  # of the step in its epoch
    what: str
    own: bool  # whether the loss of this process's own images is not finite, not only the gradient of all


class LossMonitor:
    """The recorded steps of one process whose losses have not been read yet."""

    def __init__(self) -> None:
        self.bad: NonFiniteStep | None = None  # the first one
        self.in_a_row = 0  # consecutive skipped steps
        self._noted: list[
            tuple[int, int, Tensor, Tensor | None]
        ] = []  # step, its index in the epoch, loss, gradient's norm

    def add(self, step: int, index: int, loss: Tensor, grad_norm: Tensor | None) -> None:
        """Record an optimizer step, the `index`-th of its epoch."""
        self._noted.append((step, index, loss, grad_norm))

    def collect(self) -> list[tuple[int, float]]:
        """Wait for the device, and return the steps recorded since the last call, each with its loss."""
        if not self._noted:
            return []
        steps, places, on_device, norms = zip(*self._noted, strict=True)
        self._noted.clear()
        losses = torch.stack(on_device).tolist()
        values = [0.0] * len(losses) if norms[0] is None else torch.stack(norms).tolist()
        for step, index, loss, norm in zip(steps, places, losses, values, strict=True):
            self.bad = self.bad or check_finite(step, index, loss, norm)
        return list(zip(steps, losses, strict=True))


def check_finite(step: int, index: int, loss: float, norm: float) -> NonFiniteStep | None:
    """Return what is wrong with a step of this loss and gradient norm; None for finite ones."""
    if not math.isfinite(loss):
        return NonFiniteStep(step, index, f"the loss is {loss}", own=True)
    return None if math.isfinite(norm) else NonFiniteStep(step, index, f"the gradient's norm is {norm}", own=False)


def describe(
    engine: Engine, bad: NonFiniteStep | None, training: Batches | Synthetic, progress: Progress, folder: Path | None
) -> tuple[NonFiniteStep, str]:
    """Return the first bad step of all processes, and a sentence about its images, listed in `folder`. Collective.

    Args:
        bad: the bad step of this process, if any.
        folder: the run folder on the main process; None elsewhere, where the sentence is empty.
    """
    seen = [other for other in engine.all_gather_objects(bad) if other is not None]
    first = min(seen, key=lambda other: (other.step, not other.own))
    blamed = bad is not None and bad.step == first.step and bad.own == first.own
    index, accumulation = first.index, engine.batch_sizes.accumulation
    names = images_of(training, progress.epoch, index * accumulation, (index + 1) * accumulation) if blamed else []
    names = [name for of_process in engine.all_gather_objects(names) for name in of_process]
    if folder is None:
        return first, ""
    path = folder / "bad_steps" / f"step-{first.step:08d}.txt"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, "".join(f"{name}\n" for name in names))
    example = names[0].replace("\t", " ")
    return first, f"its {len(names)} images, {example} and others, are listed in {near_path(path)}"


def images_of(training: Batches | Synthetic, epoch: int, start: int, stop: int) -> list[str]:
    """Return this process's images of batches `start` to `stop` of an epoch: position in the list, file, class."""
    if isinstance(training, Synthetic):
        return ["noise"]
    split, classes = training.split, training.dataset.classes
    return [
        f"{i}\t{split.paths[i]}\t{classes[split.labels[i]]}" for i in training.positions(epoch, start, stop).tolist()
    ]
