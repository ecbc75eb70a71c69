"""The steps of a run as its epochs and trackers count them: losses, gradient norms, skipped steps.

Values stay on the device until `collect`, so that training does not wait for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dali_pipeline import Batches, Synthetic
from parallel.engine import Engine
from records.run_folder import Progress
from training.non_finite import HINT, MAX_CONSECUTIVE_SKIPS, LossMonitor, NonFiniteLoss, check_finite, describe
from training.trackers import Tracking


class StepLog:
    """Records the steps of one process."""

    def __init__(
        self,
        engine: Engine,
        training: Batches | Synthetic,
        tracking: Tracking,
        folder: Path | None,
        print_field: Callable[[str, str], None],
    ):
        """`folder` is the run folder on the main process, and None on others."""
        self.engine, self.training, self.tracking = engine, training, tracking
        self.folder, self.print_field = folder, print_field
        self.monitor = LossMonitor()
        self._norms: list[tuple[int, dict[str, Tensor]]] = []  # measured gradients that are still on the device

    def has_failed(self) -> bool:
        """Whether a step read so far was not finite."""
        return self.monitor.bad is not None

    def add(self, progress: Progress, loss: Tensor, step: int) -> None:
        """Record the step that the engine has just made or skipped.

        Args:
            progress: before this step.

        Raises:
            NonFiniteLoss: too many steps in a row were skipped; on all processes.
        """
        engine, monitor, index = self.engine, self.monitor, progress.step_in_epoch
        if engine.norms and engine.is_main:
            self._norms.append((step, engine.norms))
        if not engine.skipped:
            monitor.in_a_row = 0
            monitor.add(step, index, loss, engine.grad_norm)
            return
        progress.skipped_steps += 1
        monitor.in_a_row += 1
        assert engine.grad_norm is not None  # by it, the engine decides what it skips
        problem = check_finite(step, index, loss.item(), float(engine.grad_norm))
        bad, images = describe(engine, problem, self.training, progress, self.folder)
        self.print_field("skipped", f"step {bad.step:,}: {bad.what}; {images}")
        if monitor.in_a_row == MAX_CONSECUTIVE_SKIPS:
            raise NonFiniteLoss(
                f"{MAX_CONSECUTIVE_SKIPS} steps in a row had a loss or a gradient that is not finite; "
                f"the last checkpoint is unchanged. {HINT}"
            )

    def collect(self, progress: Progress) -> None:
        """Wait for the device, and add the recorded losses to the sum of the epoch."""
        losses = self.monitor.collect()
        for step, norms in self._norms:
            self.tracking.gradients(step, dict(zip(norms, torch.stack([*norms.values()]).tolist(), strict=True)))
        self._norms.clear()
        for _, loss in losses:  # one by one, so that the sum does not depend on how many are read at once
            progress.loss_sum += loss
        progress.num_losses += len(losses)
        self.tracking.losses(losses)

    def failure(self, progress: Progress) -> NonFiniteLoss:
        """Return the error that names the first step of all processes that was not finite, and its images. Collective.

        Only the main process has the images.
        """
        bad, images = describe(self.engine, self.monitor.bad, self.training, progress, self.folder)
        return NonFiniteLoss(
            f"{bad.what} at optimizer step {bad.step}; the last checkpoint is unchanged. {HINT}; "
            f"--skip-bad-steps skips such steps. Of that step, {images}"
        )
