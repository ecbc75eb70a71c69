"""Exact evaluation of trained networks on a split, and the dataset for it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import DatasetError, RunError
from common.paths import PROJECT
from inference.trained_model import TrainedModel

if TYPE_CHECKING:
    from torch import Tensor

    from image_data.dataset import Dataset
    from models.calibration import Calibration

SHOWN_CONFUSIONS = 10
FLIP, ENSEMBLE = "test-time flip", "ensemble"  # names of results that combine predictions


@dataclass(frozen=True)
class SplitResult:
    """The result of one network on a split, over all processes.

    Attributes:
        confusion: counts int64 (K, K), rows true and columns predicted.
        top5: number of images whose class is among the five with the highest scores.
        loss_sum: sum of the cross-entropy over the images, in nats.
        calibration: counts by confidence.
    """

    confusion: np.ndarray
    top5: int
    loss_sum: float
    calibration: Calibration


def open_dataset(trained: TrainedModel, folder: Path | None) -> Dataset:
    """Return the dataset of the run, or the one in `folder`, with the normalization of the training.

    Raises:
        DatasetError: it does not exist, or its classes or its image size differ from those of the training.
    """
    from image_data.dataset import Dataset, prepare_first

    facts = trained.facts["dataset"]
    place = folder or PROJECT / facts["folder"]
    if folder is None and not Dataset.is_prepared(place):
        raise DatasetError(
            f"{place}, the dataset of the training, is not prepared. If it was moved, add --data-dir NEW_PLACE. "
            f"Otherwise run: {prepare_first(place)}"
        )
    dataset = Dataset.open(place)
    check_same_classes(dataset.classes, trained.classes)
    return normalize_as_trained(dataset, facts)


def open_split(trained: TrainedModel, split: str, folder: Path | None) -> Dataset:
    """Return the dataset as `open_dataset` does, with its validation split if `split` is "validation".

    Raises:
        DatasetError: as `open_dataset`.
        RunError: the run has no validation split.
    """
    dataset, hold_out = open_dataset(trained, folder), trained.facts["hold_out"]
    if split != "validation":
        return dataset
    if not hold_out:
        raise RunError(f"{trained.record.folder} has no validation split. Use --split test")
    return dataset.hold_out(hold_out)


def evaluate(
    networks: dict[str, Any],
    batches: Any,
    num_classes: int,
    device: Any,
    autocast: bool,
    show: bool,
    flip: bool = False,
    ensemble: tuple[str, ...] = (),
) -> dict[str, SplitResult]:
    """Evaluate networks on a split in one pass over its images. Collective.

    Args:
        networks: name -> network, all of which take the images of `batches`.
        show: whether to show a progress bar.
        flip: also average the probabilities of each image and its mirror image, by the first network.
        ensemble: names of networks whose averaged probabilities are evaluated too.

    Returns:
        Name of the network, FLIP or ENSEMBLE -> result over all processes.
    """
    import torch
    from tqdm import tqdm

    from models.calibration import CalibrationCounts
    from models.classification_metrics import ClassificationCounts

    names = [*networks, *([FLIP] if flip else []), *([ENSEMBLE] if ensemble else [])]
    counts = {name: (ClassificationCounts(device, num_classes), CalibrationCounts(device)) for name in names}
    precision = torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
    with torch.inference_mode():
        for images, labels in tqdm(batches.epoch(), total=len(batches), unit="batch", leave=False, disable=not show):
            with precision:
                scores = {name: _scores(network, images) for name, network in networks.items()}
                if flip:
                    mirrored = _scores(next(iter(networks.values())), images.flip(-1))
                    scores[FLIP] = average_predictions([next(iter(scores.values())), mirrored])
            if ensemble:
                scores[ENSEMBLE] = average_predictions([scores[name] for name in ensemble])
            for name, (classification, calibration) in counts.items():
                classification.add(scores[name], labels)
                calibration.add(scores[name], labels)
    return {name: _result(*pair, num_classes) for name, pair in counts.items()}


def _scores(network: Any, images: Tensor) -> Tensor:
    return network(images.to(next(network.parameters()).dtype)).float()


def average_predictions(scores: list[Tensor]) -> Tensor:
    """Return the logarithm of the mean probabilities, (B, K), of several class scores (B, K)."""
    import torch

    return torch.stack([part.log_softmax(dim=1) for part in scores]).logsumexp(dim=0) - np.log(len(scores))


def _result(classification: Any, calibration: Any, num_classes: int) -> SplitResult:
    classification.reduce()
    calibration.reduce()
    confusion = classification.confusion.view(num_classes, num_classes).cpu().numpy()
    top5, loss_sum = int(classification.counts[1]), classification.loss_sum.item()
    return SplitResult(confusion, top5, loss_sum, calibration.result())


def summarize(result: SplitResult) -> dict[str, Any]:
    """Return the numbers of a result without those by class, ready for JSON."""
    seen, correct = int(result.confusion.sum()), int(np.trace(result.confusion))
    return {
        "correct": correct,
        "correct_top5": result.top5,
        "seen": seen,
        "accuracy": correct / seen,
        "top5_accuracy": result.top5 / seen,
        "loss": result.loss_sum / seen,
        "expected_calibration_error": round(result.calibration.expected_error, 6),
    }


def describe(result: SplitResult, classes: list[str]) -> dict[str, Any]:
    """Return all numbers of a result, also by class and by confidence, ready for JSON."""
    confusion, calibration = result.confusion, result.calibration
    wrong = confusion - np.diag(np.diag(confusion))
    worst = np.argsort(-wrong, axis=None, kind="stable")[:SHOWN_CONFUSIONS]
    pairs = [divmod(int(i), len(classes)) for i in worst if wrong.flat[i]]
    return {
        **summarize(result),
        "per_class": {
            name: {"correct": int(confusion[i, i]), "seen": int(confusion[i].sum())} for i, name in enumerate(classes)
        },
        "worst_confusions": [
            {"true": classes[t], "predicted": classes[p], "count": int(wrong[t, p])} for t, p in pairs
        ],
        "calibration": {
            "seen": calibration.seen,
            "correct": calibration.correct,
            "confidence_sum": [round(total, 6) for total in calibration.confidence_sum],
        },
    }


def check_same_classes(found: list[str], trained: list[str]) -> None:
    """Raise DatasetError for a dataset whose labels mean other classes than in training."""
    if found != trained:
        difference = next(
            (f"{a!r} instead of {b!r}" for a, b in zip(found, trained, strict=False) if a != b),
            f"{len(found)} instead of {len(trained)}",
        )
        raise DatasetError(
            f"the dataset's classes are not the run's ({difference}). Name the dataset of the training with --data-dir"
        )


def normalize_as_trained(dataset: Any, trained: dict[str, Any]) -> Any:
    """Return the dataset with the mean and std of the training. Raises DatasetError for another image size."""
    if dataset.image_side != trained["image_side"]:
        found, due = (
            f"{side} pixels" if side else "several sizes" for side in (dataset.image_side, trained["image_side"])
        )
        raise DatasetError(
            f"the dataset has images of side {found}, and the run was trained on {due}. "
            "Name the dataset of the training with --data-dir"
        )
    return replace(dataset, mean=tuple(trained["mean"]), std=tuple(trained["std"]))
