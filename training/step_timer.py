"""The training time of a run: its steps without those that compile or warm up, and without the time in between."""

from __future__ import annotations

import time

from torch import Tensor

from dali_pipeline import Batches, Synthetic
from parallel.compile import FIRST_STEPS_SECONDS
from parallel.engine import Engine
from parallel.process_group import limit_waits
from records.run_folder import Progress
from training.time_plan import TimePlan


class StepTimer:
    """Times steps in a row, from one pause (an evaluation, a checkpoint) to the next.

    The first steps after a start compile or warm up. They are counted as warmup, and other processes are waited for
    longer during them.

    Attributes:
        time_plan: counts the same steps until they suffice to plan the run; None: nothing is planned any more.
    """

    def __init__(self, engine: Engine, training: Batches | Synthetic, time_plan: TimePlan | None):
        self.engine, self.training, self.time_plan = engine, training, time_plan
        self._first_steps_left = engine.first_steps

    def expect_first_steps(self) -> None:
        """Treat the next steps as the first ones: their images have another size, for which the engine compiles."""
        self._first_steps_left = self.engine.first_steps
        limit_waits(FIRST_STEPS_SECONDS if self._first_steps_left else 0.0)

    def start(self, num_steps: int) -> None:
        """Start before `num_steps` steps in a row, the last of which is timed in any case."""
        self._first_steps_left = min(self._first_steps_left, num_steps - 1)
        self._begin()
        if self.time_plan:
            self.time_plan.start()

    def _begin(self) -> None:
        self._began, self.training.wait_seconds = time.perf_counter(), 0.0

    def add(self, progress: Progress, loss: Tensor) -> None:
        """Count a step that has just been made; one that compiles or warms up is not timed."""
        if self._first_steps_left <= 0:
            progress.timed_images += self.engine.batch_sizes.total
            return
        loss.item()  # waits for the device
        progress.warmup_seconds += self.seconds()
        self._first_steps_left -= 1
        if not self._first_steps_left:
            limit_waits()
        self._begin()
        if self.time_plan:
            self.time_plan.restart()

    def is_plan_due(self) -> bool:
        """Count the same step for the plan, and return whether the steps so far suffice for it."""
        return self.time_plan is not None and self.time_plan.is_due(self.engine.step)

    def seconds(self) -> float:
        """Return the time since the start, or since the last step that was not timed."""
        return time.perf_counter() - self._began

    def stop(self, progress: Progress, profile_seconds: float) -> None:
        """Add the time since the start to the epoch's, without that of writing a profile."""
        if not self._first_steps_left:
            limit_waits()  # also where the only step in a row compiled, and was timed
        if self.time_plan:
            self.time_plan.stop()
        progress.training_seconds += self.seconds() - profile_seconds
        progress.data_wait_seconds += self.training.wait_seconds
