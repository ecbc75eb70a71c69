"""The number of steps of a run of a given training time (`train.py --max-minutes`), planned from its first steps.

A schedule of elapsed seconds would make every run unique. Here the first steps are timed, the rest is planned once, and
the plan is saved with the run. From then on everything depends on the step only, and a resumed run equals an
uninterrupted one bit by bit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from optim.lr_schedule import Plan, Schedule
from parallel.progressive_resizing import ProgressiveResizing

UNTIMED_STEPS = 2  # first steps after a start: they allocate memory and fill the queue of batches
TIMED_STEPS = 10  # at least
TIMED_SHARE = 0.02  # of the training time, at least: 12 s of 10 minutes
SECONDS_PER_MINUTE = 60.0


@dataclass
class TimePlan:
    """Times steps until they are enough for a plan.

    Attributes:
        schedule: of the run; its total is an estimate until `make` is called.
        budget: training time of the whole run, in seconds.
        resizing: of the run, whose later steps may have larger images and take longer.
        side: side of the images in the last steps, in pixels.
        only_shortens: the estimate is also the largest number of steps.
    """

    schedule: Schedule
    budget: float
    resizing: ProgressiveResizing
    side: int
    only_shortens: bool = False
    steps: int = 0  # since the start of this process
    seconds: float = 0.0  # of the timed ones among them

    def start(self) -> None:
        """Start the clock: before the first step after a start, an evaluation or a checkpoint."""
        self._began = time.perf_counter()

    def restart(self) -> None:
        """Forget all steps so far, after one that compiled or warmed up."""
        self.steps, self.seconds = 0, 0.0
        self.start()

    def stop(self) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self._began

    def is_due(self, step: int) -> bool:
        """Count a step, which was the run's `step`, and return whether the steps so far allow a plan.

        It is due before the images grow in any case: a later plan with more steps would shrink them again.
        """
        self.steps += 1
        if step in (self.resizing.num_steps(self.schedule.total), self.schedule.total):
            return True
        if self.steps <= UNTIMED_STEPS:
            self.seconds = 0.0
            self.start()
            return False
        enough = self.seconds + time.perf_counter() - self._began >= TIMED_SHARE * self.budget
        return enough and self.steps >= UNTIMED_STEPS + TIMED_STEPS

    def seconds_per_step(self) -> float:
        """Return the mean of the timed steps, 0 where there are none yet. Stops the clock."""
        self.stop()
        self.start()
        timed = self.steps - UNTIMED_STEPS
        return self.seconds / timed if timed > 0 else 0.0

    def full_step_seconds(self, step: int, seconds_per_step: float) -> float:
        """Return the seconds of a step with full images, from those of the steps before `step`.

        A step with the smaller images of progressive resizing costs less by the number of its pixels.
        """
        is_small = step <= self.resizing.num_steps(self.schedule.total)
        return seconds_per_step / self.resizing.pixel_share(self.side) if is_small else seconds_per_step

    def make(self, step: int, spent: float, full_step_seconds: float) -> Plan:
        """Return the plan of a run that has made `step` steps in `spent` seconds of training."""
        work = max(0.0, self.budget - spent) / max(full_step_seconds, 1e-9)
        total = total_within(work, step, self.resizing, self.side)
        return Plan(step, self.schedule.total, min(total, self.schedule.total) if self.only_shortens else total)


def time_plan_of(
    max_minutes: float | None, only_shortens: bool, schedule: Schedule, resizing: ProgressiveResizing, side: int
) -> TimePlan | None:
    """Return what plans a run of this training time; None without a limit, and where a resumed run has its plan."""
    if not max_minutes or schedule.plan:
        return None
    return TimePlan(schedule, SECONDS_PER_MINUTE * max_minutes, resizing, side, only_shortens)


def total_within(work: float, step: int, resizing: ProgressiveResizing, side: int) -> int:
    """Return the total of a run that has made `step` steps and can do the work of so many more with full images."""
    total = round(step + work)
    if step >= resizing.num_steps(total):
        return total
    share, small = resizing.pixel_share(side), resizing.settings.fraction  # of the pixels, and of all steps
    return max(step, round((work + step * share) / (small * share + 1 - small)))


def describe(plan: Plan, seconds_per_step: float, seconds: float, steps_per_epoch: int) -> str:
    """Return the line for the screen; `seconds` is the training time of the whole run."""
    epochs = plan.total_steps / steps_per_epoch
    return (
        f"{plan.total_steps:,} steps ({epochs:.1f} epochs) at {seconds_per_step:.3g} s per step take "
        f"{seconds / SECONDS_PER_MINUTE:.3g} min of training"
    )
