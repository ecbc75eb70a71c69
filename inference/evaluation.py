"""Exact counts of a trained network over a split, and the dataset that they are counted on."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.paths import PROJECT
from inference.trained_model import TrainedModel

if TYPE_CHECKING:
    from image_data.dataset import Dataset

SHOWN_CONFUSIONS = 10


def open_dataset(trained: TrainedModel, folder: Path | None) -> Dataset:
    """The dataset of the run, or the one in `folder`, to be normalised as in training. Raises DatasetError where it does not fit."""
    from image_data.dataset import Dataset

    facts = trained.facts["dataset"]
    dataset = Dataset.open(folder or PROJECT / facts["folder"])
    check_same_classes(dataset.classes, trained.classes)
    return normalise_as_trained(dataset, facts)


def evaluate(model: Any, batches: Any, num_classes: int, device: Any, autocast: bool, show: bool) -> dict[str, Any]:
    """Sums over the split, over all processes: `confusion` int64 (K, K) with rows true, `top5` int, `loss_sum` float."""
    import torch
    from tqdm import tqdm

    from models.classification_metrics import ClassificationCounts

    dtype = next(model.parameters()).dtype
    counts = ClassificationCounts(device, num_classes)
    precision = torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
    with torch.inference_mode(), precision:
        for images, labels in tqdm(batches.epoch(), total=len(batches), unit="batch", leave=False, disable=not show):
            counts.add(model(images.to(dtype)), labels)
    counts.reduce()
    confusion = counts.confusion.view(num_classes, num_classes).cpu().numpy()
    return {"confusion": confusion, "top5": int(counts.counts[1]), "loss_sum": counts.loss_sum.item()}


def describe(result: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    """The counts of a report for programs, ready for JSON."""
    confusion = result["confusion"]
    seen, correct = int(confusion.sum()), int(np.trace(confusion))
    wrong = confusion - np.diag(np.diag(confusion))
    worst = np.argsort(-wrong, axis=None, kind="stable")[:SHOWN_CONFUSIONS]
    pairs = [divmod(int(i), len(classes)) for i in worst if wrong.flat[i]]
    return {
        "correct": correct,
        "correct_top5": result["top5"],
        "seen": seen,
        "accuracy": correct / seen,
        "top5_accuracy": result["top5"] / seen,
        "loss": result["loss_sum"] / seen,
        "per_class": {
            name: {"correct": int(confusion[i, i]), "seen": int(confusion[i].sum())} for i, name in enumerate(classes)
        },
        "worst_confusions": [
            {"true": classes[t], "predicted": classes[p], "count": int(wrong[t, p])} for t, p in pairs
        ],
    }


def check_same_classes(found: list[str], trained: list[str]) -> None:
    """Refuse a dataset whose labels mean something else than they did in training. Raises DatasetError."""
    from common.errors import DatasetError

    if found != trained:
        odd = next(
            (f"{a!r} instead of {b!r}" for a, b in zip(found, trained, strict=False) if a != b),
            f"{len(found)} instead of {len(trained)}",
        )
        raise DatasetError(
            f"the dataset's classes are not the run's ({odd}); give the dataset it was trained on with --data-dir"
        )


def normalise_as_trained(dataset: Any, trained: dict[str, Any]) -> Any:
    """The dataset with the mean and std that the network was trained with. Raises DatasetError for another image side."""
    from dataclasses import replace

    from common.errors import DatasetError

    if dataset.image_side != trained["image_side"]:
        raise DatasetError(
            f"the dataset has images of side {dataset.image_side}, the run was trained on {trained['image_side']}"
        )
    return replace(dataset, mean=tuple(trained["mean"]), std=tuple(trained["std"]))
