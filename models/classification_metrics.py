"""Exact counts of a classification: loss, top-1, top-5, confusion. Padding rows, whose label is -1, are left out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

PADDING_LABEL = -1


def best_classes(scores: Tensor) -> Tensor:
    """Return the classes of the five largest scores (B, K), the largest first: (B, 5), or (B, K) of fewer classes.

    In bf16 two scores of one image in a thousand are equal. All counts and pictures take the winner from here, so that
    they agree on it.
    """
    return scores.topk(min(5, scores.shape[1])).indices


def predicted_with_confidence(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the predicted class and its probability, (B,) each, of class scores (B, K)."""
    scores = scores.float()
    predicted = best_classes(scores)[:, 0]
    return predicted, scores.softmax(dim=1).gather(1, predicted[:, None])[:, 0]


class ClassificationCounts:
    """Sums over the batches of this process, until `reduce` adds those of all processes.

    No method synchronizes host and device.

    Attributes:
        counts: int64 (3,): correct, correct in the top five, seen.
        loss_sum: float64: summed cross-entropy.
        confusion: int64 (K * K,), flattened, rows true and columns predicted; None without `num_classes`.
    """

    def __init__(self, device: torch.device, num_classes: int | None = None):
        self.num_classes = num_classes
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device) if num_classes else None

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Count a batch: class scores (B, K), labels (B,)."""
        scores, real = scores.float(), labels != PADDING_LABEL
        best = best_classes(scores)
        hits = best == labels[:, None]
        self.counts += torch.stack([hits[:, 0].sum(), hits.any(dim=1).sum(), real.sum()])
        self.loss_sum += F.cross_entropy(scores, labels, ignore_index=PADDING_LABEL, reduction="sum").double()
        if self.confusion is not None and self.num_classes:
            self.confusion.scatter_add_(0, labels.clamp(min=0) * self.num_classes + best[:, 0], real.to(torch.int64))

    def reduce(self) -> None:
        """Add the counts of all processes, in all of them. Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            for total in (self.counts, self.loss_sum, self.confusion):
                if total is not None:
                    dist.all_reduce(total)


class ImageResults(NamedTuple):
    """One result for each of the R real images of a batch, (R,) each."""

    labels: Tensor
    predicted: Tensor
    probability: Tensor  # of the predicted class
    losses: Tensor  # cross-entropy


def image_results(scores: Tensor, labels: Tensor) -> ImageResults:
    """Return one result for each real image, from class scores (B, K) and labels (B,)."""
    real = labels != PADDING_LABEL
    scores, labels = scores.float()[real], labels[real]
    predicted, probability = predicted_with_confidence(scores)
    return ImageResults(labels, predicted, probability, F.cross_entropy(scores, labels, reduction="none"))
