"""Cost of training runs in runs, images and hours: of those on the disk, and of those that are planned."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.text import duration
from comparison.experiment import Experiment, Variant
from comparison.planned_run import PlannedRun
from records.run_folder import RunFolder

SECONDS = ("training_seconds", "warmup_seconds", "tracking_seconds", "validation_seconds", "test_seconds")


@dataclass(frozen=True)
class RunCost:
    """So many runs, the images that they train on, and the hours that they take without their start-up."""

    runs: int = 0
    images: int | None = 0  # None where it is not known yet
    hours: float | None = 0.0  # summed over the runs; None where no earlier run tells it

    def __add__(self, other: RunCost) -> RunCost:
        images = None if self.images is None or other.images is None else self.images + other.images
        hours = None if self.hours is None or other.hours is None else self.hours + other.hours
        return RunCost(self.runs + other.runs, images, hours)

    def __mul__(self, count: int) -> RunCost:
        images = None if self.images is None else count * self.images
        return RunCost(count * self.runs, images, None if self.hours is None else count * self.hours)

    def __str__(self) -> str:
        parts = [f"{self.runs:,} run{'s' * (self.runs != 1)}"]
        if self.images is not None:
            parts.append(f"{self.images:,} images")
        return ", ".join([*parts, *([] if self.hours is None else [duration(3600 * self.hours)])])


def spent(tasks: Iterable[PlannedRun]) -> RunCost:
    """Return what the runs have cost so far; those that were not started are not counted."""
    total = RunCost()
    for task in tasks:
        if task.state() != "new":
            total += of_folder(RunFolder(task.folder))
    return total


def of_folder(record: RunFolder) -> RunCost:
    """Return the cost of one run, as far as its epochs are recorded."""
    lines = record.metrics()
    if not lines:
        return RunCost(1)
    return RunCost(1, lines[-1]["step"] * record.facts()["batch"]["total"], recorded_seconds(lines) / 3600)


def recorded_seconds(lines: Iterable[dict[str, Any]]) -> float:
    """Return the seconds of training and evaluation in the lines of metrics.jsonl."""
    return sum(line.get(key, 0.0) for line in lines for key in SECONDS)


class Speeds:
    """Seconds per image of earlier runs of an experiment's preset, for each network where it has been trained."""

    def __init__(self, experiment: Experiment, runs_dir: Path):
        found: dict[str, list[float]] = {}
        for path in sorted({path.parent for one in ("*/run.json", "*/*/run.json") for path in runs_dir.glob(one)}):
            try:
                facts, cost = RunFolder(path).facts(), of_folder(RunFolder(path))
                if facts.get("preset") == experiment.preset and cost.images and cost.hours:
                    key = _key(facts["settings"]["model"])
                    found.setdefault(key, []).append(3600 * cost.hours / cost.images)
            except (OSError, ValueError, KeyError, TypeError, RunError):
                continue  # a damaged folder is no basis for a plan
        self.by_network = {key: sum(values) / len(values) for key, values in found.items()}

    def hours(self, variant: Variant, images: int) -> float | None:
        """Return the hours that these images take a variant; None where no run of the preset was found.

        A network that was never trained is assumed to be as fast as the mean of the others.
        """
        if not self.by_network:
            return None
        mean = sum(self.by_network.values()) / len(self.by_network)
        return images * self.by_network.get(_key(variant.settings.as_dict()["model"]), mean) / 3600


def _key(model: dict[str, Any]) -> str:
    return json.dumps(model, sort_keys=True, default=str)
