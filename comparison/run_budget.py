"""The most runs and hours that a comparison may take, tuning included (`max_runs`, `max_hours`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import RunError, SettingsError
from common.stop_signal import StopSignal
from comparison.experiment import Experiment
from comparison.planned_run import PlannedRun
from comparison.run_costs import of_folder
from records.run_folder import ASIDE, RunFolder

CALIBRATIONS = 2  # short runs that measure the speed of a variant, for a budget in seconds


class RunBudget:
    """Ends the runs of a comparison like a signal, once its hours are used up.

    Args:
        folder: of the run folders. What they have cost counts, whichever start of compare.py made them: as recorded,
            so without the start-up of these runs.
        clock: seconds.
    """

    def __init__(
        self, experiment: Experiment, folder: Path, stop: StopSignal, clock: Callable[[], float] = time.monotonic
    ):
        self.max_runs, self.max_hours = experiment.max_runs, experiment.max_hours
        self.folder, self.stop, self.clock = folder, stop, clock
        self.seconds = 3600 * sum(_hours(path.parent) for path in self._existing())  # until `since`
        self.active, self.since = 0, clock()
        self.problem = ""  # which limit was reached

    @property
    def number(self) -> int:
        """Return the signal that ends the runs, -1 where the hours do; 0 while they may continue."""
        if self.max_hours is not None and self._hours_used() >= self.max_hours:
            self.problem = f"max_hours = {self.max_hours:g} is reached"
        return self.stop.number or (-1 if self.problem else 0)

    def allows(self, tasks: Sequence[PlannedRun]) -> bool:
        """Return whether `max_runs` has room for all of these runs; runs that exist already have their place."""
        new = sum(task.state() == "new" for task in tasks)
        existing = sum(ASIDE not in path.parent.name for path in self._existing())
        if self.max_runs is not None and new and existing + new > self.max_runs:
            self.problem = f"max_runs = {self.max_runs} leaves no room for {new} more runs next to {existing}"
        return not self.number

    def set_active(self, count: int) -> None:
        """Take note that so many runs are active from now on; the hours of all of them are added."""
        now = self.clock()
        self.seconds += self.active * (now - self.since)
        self.active, self.since = count, now

    def _hours_used(self) -> float:
        return (self.seconds + self.active * (self.clock() - self.since)) / 3600

    def _existing(self) -> list[Path]:
        return list(self.folder.glob("*/run.json"))


def check_max_runs(experiment: Experiment, tuning_runs: int) -> None:
    """Raise SettingsError where `max_runs` is too small for what is planned at least.

    With seeds in rounds, that is tuning and the first round.
    """
    times = 2 if experiment.tuning and experiment.tuning.report_shared else 1
    calibrations = CALIBRATIONS * len(experiment.variants) if experiment.budget == "seconds" else 0
    planned = calibrations + tuning_runs + times * len(experiment.variants) * experiment.seeds
    if experiment.max_runs is not None and planned > experiment.max_runs:
        before = {"to measure the speed": calibrations, "for tuning": tuning_runs}
        counts = [f"{count} {purpose}" for purpose, count in before.items() if count]
        parts = " and ".join([*counts, f"{planned - calibrations - tuning_runs} to compare"])
        raise SettingsError(
            f"max_runs = {experiment.max_runs} is less than the {planned} runs planned ({parts}); raise it, or use "
            "fewer seeds, variants or candidates"
        )


def _hours(folder: Path) -> float:
    try:
        return of_folder(RunFolder(folder)).hours or 0.0
    except (OSError, ValueError, KeyError, TypeError, RunError):
        return 0.0  # a damaged folder
