"""The base class of trackers, and the numbers that they log."""

from __future__ import annotations

from typing import Any

import numpy as np


class Tracker:
    """Receives the events of a run. A subclass overrides the methods that it needs."""

    def batch(self, pixels: np.ndarray) -> None:
        """Log the first training images: uint8 (rows, columns, S, S, 3), augmented. Only in a run that starts."""

    def loss(self, step: int, mean: float, steps: int) -> None:
        """Log the main process's mean training loss over the last `steps` steps up to `step`."""

    def gradients(self, step: int, norms: dict[str, float]) -> None:
        """Log the gradient norms and update/weight ratios of a step, before the loss of that step."""

    def epoch(self, line: dict[str, Any]) -> None:
        """Log the line of metrics.jsonl that was just written."""

    def close(self, failed: bool) -> None:
        """Finish: the run is finished, stopped or, with `failed`, ended by an error."""


def numbers_of(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl except `step`, which is their x coordinate."""
    return {name: value for name, value in line.items() if isinstance(value, (int, float)) and name != "step"}
