"""What a run folder says, read once for all pictures: run.json, metrics.jsonl, steps.jsonl, utilisation.jsonl."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.settings import resolve
from records.run_folder import RunRecord

Series = tuple[list[float], list[float]]


@dataclass(frozen=True)
class RunData:
    """One run. `steps` are training losses by optimiser step, `samples` what GPU and CPU did; both may be empty."""

    name: str
    folder: Path
    facts: dict[str, Any]
    metrics: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> RunData:
        """Raises RunError for a folder that holds no run."""
        record = RunRecord(folder)
        return cls(record.folder.resolve().name, record.folder, record.facts(), record.metrics(),
                   read_lines(record.folder / "steps.jsonl"), read_lines(record.folder / "utilisation.jsonl"))

    @property
    def num_classes(self) -> int:
        return len(self.facts["dataset"]["classes"])

    @property
    def last_epoch(self) -> float:
        """How far it has come; a fraction where a budget of steps ended inside an epoch."""
        done = max((line["step"] for line in [*self.metrics[-1:], *self.steps[-1:]]), default=0)
        return done / self.facts["steps_per_epoch"]

    def series(self, key: str, factor: float = 1.0) -> Series:
        """Epochs, and the values of a key of metrics.jsonl there, from the lines that have it."""
        lines = [line for line in self.metrics if key in line]
        return [line["step"] / self.facts["steps_per_epoch"] for line in lines], [factor * line[key] for line in lines]

    def step_losses(self) -> Series:
        """Epochs, and the mean training loss of the steps that end there."""
        return [line["step"] / self.facts["steps_per_epoch"] for line in self.steps], [line["step_loss"] for line in self.steps]

    def headline(self) -> str:
        """The result in a few words."""
        if not self.metrics:
            return f"{self.name}: no epoch finished yet"
        last = self.metrics[-1]
        split = "test" if "test_accuracy" in last else "validation"
        of = "held-out" if split == "validation" else "test"
        return f"{self.name}: {100 * last[f'{split}_accuracy']:.2f}% {of} accuracy after {last['epoch']} epoch{'s' if last['epoch'] > 1 else ''}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; a torn last one (power cut) is left out, a file that is not there is empty."""
    lines = path.read_text().split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines[:-1] if line]


def leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """Dotted paths of a tree of settings, and their values."""
    if not isinstance(tree, dict) or not tree:
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}.{key}" if path else key)]


def changed_settings(settings: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What is not the default: path, value, default (None for a setting that the defaults do not have)."""
    defaults = dict(leaves(resolve(None, []).as_dict()))
    return [(path, value, defaults.get(path)) for path, value in leaves(settings) if value != defaults.get(path)]
