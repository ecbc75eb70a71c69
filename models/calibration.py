"""Calibration of a classifier: how often predictions of a given confidence are correct."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from models.classification_metrics import PADDING_LABEL, predicted_with_confidence

NUM_BINS = 15  # equal widths of confidence, as in https://arxiv.org/abs/1706.04599


@dataclass(frozen=True)
class Calibration:
    """Counts by bin of confidence; bin i of n holds confidences in (i / n, (i + 1) / n].

    Attributes:
        seen: number of predictions.
        correct: number of correct predictions.
        confidence_sum: sum of their confidences.
    """

    seen: list[int]
    correct: list[int]
    confidence_sum: list[float]

    @property
    def expected_error(self) -> float:
        """Expected calibration error (ECE): mean of |accuracy - confidence| over the bins, weighted by their counts.

        Guo et al., "On Calibration of Modern Neural Networks": https://arxiv.org/abs/1706.04599
        """
        gaps = (abs(right - total) for right, total in zip(self.correct, self.confidence_sum, strict=True))
        return sum(gaps) / max(1, sum(self.seen))


class CalibrationCounts:
    """Counts by bin over the batches of this process, until `reduce` adds those of all processes."""

    def __init__(self, device: torch.device, num_bins: int = NUM_BINS):
        self.num_bins = num_bins
        self.counts = torch.zeros(3, num_bins, dtype=torch.float64, device=device)

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count a batch: class scores (B, K) and labels (B,). Padding rows are left out."""
        predicted, confidence = predicted_with_confidence(scores)
        self.add_confidences(confidence, predicted == labels, labels != PADDING_LABEL)

    def add_confidences(self, confidence: Tensor, is_correct: Tensor, is_real: Tensor) -> None:
        """Count predictions by their confidence, whether they are correct, and whether they count at all; (B,) each."""
        bins = (confidence.double() * self.num_bins).ceil().long().clamp(1, self.num_bins) - 1
        real = is_real.double()
        self.counts.index_add_(1, bins, torch.stack([real, real * is_correct, real * confidence.double()]))

    def reduce(self) -> None:
        """Add the counts of all processes, in all of them. Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.counts)

    def result(self) -> Calibration:
        seen, correct, confidence_sum = self.counts.tolist()
        return Calibration([round(count) for count in seen], [round(count) for count in correct], confidence_sum)
