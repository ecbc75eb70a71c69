"""Steps whose loss or gradient is not finite: found without making the device wait at every step, and told with their images.

Losses and gradient norms stay on the device until somebody looks at them, twice a second and before every checkpoint: so no
checkpoint holds what came after a bad step. Which images a step had follows from (seed, epoch, step).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import RunError
from common.files import write_atomically
from dali_pipeline import Batches
from parallel.engine import Engine
from records.run_folder import Progress

MAX_CONSECUTIVE_SKIPS = 10  # steps skipped one after the other, before that is no accident
HINT = "A lower optimizer.params.lr or a longer schedule.warmup_fraction usually cures it"


class NonFiniteLoss(RunError):
    """A loss or a gradient became infinite or not a number; the message names the step and its images."""


@dataclass(frozen=True)
class NonFiniteStep:
    """What one process saw of a bad step."""

    step: int
    index: int  # of the step in its epoch
    what: str
    own: bool  # the loss of its own images is to raise_for_unreadable, not only the gradient of all


class LossMonitor:
    """The steps of one process that nobody has looked at yet."""

    def __init__(self) -> None:
        self.bad: NonFiniteStep | None = None  # the first one
        self.in_a_row = 0  # steps that were skipped
        self._noted: list[
            tuple[int, int, Tensor, Tensor | None]
        ] = []  # step, its index in the epoch, loss, gradient's norm

    def add(self, step: int, index: int, loss: Tensor, grad_norm: Tensor | None) -> None:
        """Take note of an optimiser step, the `index`-th of its epoch."""
        self._noted.append((step, index, loss, grad_norm))

    def collect(self) -> list[tuple[int, float]]:
        """Wait for the device, and return the steps noted since the last time, each with its loss."""
        if not self._noted:
            return []
        steps, places, on_device, norms = zip(*self._noted, strict=True)
        self._noted.clear()
        losses = torch.stack(on_device).tolist()
        norms = [0.0] * len(losses) if norms[0] is None else torch.stack(norms).tolist()
        for step, index, loss, norm in zip(steps, places, losses, norms, strict=True):
            self.bad = self.bad or check_finite(step, index, loss, norm)
        return list(zip(steps, losses, strict=True))


def check_finite(step: int, index: int, loss: float, norm: float) -> NonFiniteStep | None:
    """What to say of a step with these figures, if anything."""
    if not math.isfinite(loss):
        return NonFiniteStep(step, index, f"the loss is {loss}", own=True)
    return None if math.isfinite(norm) else NonFiniteStep(step, index, f"the gradient's norm is {norm}", own=False)


def describe(
    engine: Engine, bad: NonFiniteStep | None, training: Batches, progress: Progress, folder: Path | None
) -> tuple[NonFiniteStep, str]:
    """The first of the processes' bad steps, and a sentence about its images, which are listed in `folder`. Collective.

    `bad` is what this process saw, `folder` the run folder on the main process; the text is empty elsewhere.
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
    return first, f"its {len(names)} images, {example} and others, are listed in {os.path.relpath(path)}"


def images_of(training: Batches, epoch: int, start: int, stop: int) -> list[str]:
    """This process's images of batches `start` to `stop` of an epoch: position in the training list, file, class."""
    if training.source == "synthetic":
        return ["noise"]
    split, classes = training.split, training.dataset.classes
    return [
        f"{i}\t{split.paths[i]}\t{classes[split.labels[i]]}" for i in training.positions(epoch, start, stop).tolist()
    ]
