"""The records of one run folder for pictures: run.json, metrics.jsonl, steps.jsonl, utilisation.jsonl."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import read_lines
from common.text import epochs_text
from records.run_folder import RunFolder

Series = tuple[list[float], list[float]]


@dataclass(frozen=True)
class RunData:
    """One run. `steps` are training losses by optimizer step, `samples` the hardware utilization; both may be empty."""

    name: str
    folder: Path
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> RunData:
        """Read a run folder. Raises RunError for a folder without a run."""
        record = RunFolder(folder)
        return cls(
            record.folder.resolve().name,
            record.folder,
            record.facts(),
            record.metrics(),
            read_lines(record.folder / "steps.jsonl"),
            read_lines(record.folder / "utilisation.jsonl"),
        )

    @property
    def num_classes(self) -> int:
        return len(self.facts["dataset"]["classes"])

    @property
    def has_top5(self) -> bool:
        """Whether the top-5 accuracy is a result: with up to five classes it is always 100 %."""
        return self.num_classes > 5

    @property
    def last_epoch(self) -> float:
        """Epochs trained so far; a fraction where --max-steps ended the run within an epoch."""
        done = max((line["step"] for line in [*self.metrics[-1:], *self.steps[-1:]]), default=0)
        return done / self.facts["steps_per_epoch"]

    def series(self, key: str, factor: float = 1.0) -> Series:
        """Return epochs and the values of a key of metrics.jsonl, from the lines that have it."""
        lines = [line for line in self.metrics if key in line]
        return [line["step"] / self.facts["steps_per_epoch"] for line in lines], [factor * line[key] for line in lines]

    def step_losses(self) -> Series:
        """Return epochs and the mean training loss of the steps that end there."""
        return [line["step"] / self.facts["steps_per_epoch"] for line in self.steps], [
            line["step_loss"] for line in self.steps
        ]

    def headline(self) -> str:
        """The result in one line."""
        if not self.metrics:
            return f"{self.name}: no epoch finished yet"
        last = self.metrics[-1]
        split = "test" if "test_accuracy" in last else "validation"
        epochs = epochs_text(last["step"], self.facts["steps_per_epoch"])
        return f"{self.name}: {100 * last[f'{split}_accuracy']:.2f}% {split} accuracy after {epochs}"
