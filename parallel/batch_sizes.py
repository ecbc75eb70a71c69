"""Batches, the division of a global batch over processes, and exact evaluation counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.errors import SettingsError

Batch = tuple[Tensor, Tensor]  # images (B, 3, S, S) float32, labels (B,) int64 with -1 for padding


@dataclass(frozen=True)
class EvalCounts:
    """Exact sums over a split and all processes."""

    correct: int
    correct_top5: int
    seen: int
    loss_sum: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.seen

    @property
    def top5_accuracy(self) -> float:
        return self.correct_top5 / self.seen

    @property
    def loss(self) -> float:
        return self.loss_sum / self.seen

    def facts(self) -> dict[str, float]:
        """Return the entries of a split in a line of `metrics.jsonl`."""
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "top5_accuracy": self.top5_accuracy,
            "correct": self.correct,
            "seen": self.seen,
        }


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of a global batch in images: total = micro * accumulation * shards."""

    total: int
    micro: int
    accumulation: int
    shards: int

    @classmethod
    def derive(cls, config: dict[str, Any], shards: int) -> BatchSizes:
        """Derive the sizes from `ds_config.json`. Raises SettingsError where the batch is not divisible."""
        total, accumulation = config["train_batch_size"], config["gradient_accumulation_steps"]
        if min(total, accumulation) < 1 or total % (accumulation * shards):
            raise SettingsError(
                f"train_batch_size={total} is not divisible by {shards} data-parallel processes times "
                f"gradient_accumulation_steps={accumulation}; choose a multiple of {max(1, accumulation) * shards}"
            )
        return cls(total, total // (accumulation * shards), accumulation, shards)
