"""Which pictures a run has: some from its numbers alone, the others from what its network makes of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from records.run_data import RunData
from reports import classes, curves, images
from reports.utilization import utilisation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from reports.predictions import Mistake

TRAINING = "Training loss is measured on augmented images and with dropout, so it may lie above the others."
SPEED = "Seconds of evaluation and of writing checkpoints are in neither."
MATRIX = "Rows sum to 100%. Names that are too small here can be read in pictures/confusion.svg."
MACHINE = (
    "A sample every two seconds, of the machine of the main process; time when the run was stopped is left out. "
    "Bands: lowest and highest of the samples that one point stands for."
)


@dataclass(frozen=True)
class SplitAnalysis:
    """What the network made of a split, image by image.

    `attention`: the arguments of `images.attention` but the title, or a sentence that says why there is none.
    """

    split: str
    confusion: np.ndarray
    loss: float
    mistakes: list[Mistake]
    attention: tuple[np.ndarray, np.ndarray, list[str]] | str

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / self.confusion.sum())


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file, and what a reader should know."""

    name: str
    figure: Figure
    caption: str


def pictures_of(run: RunData, seen: SplitAnalysis | None) -> list[Picture]:
    """Every picture that this run has; those of the data only with `seen`."""
    found = (
        [Picture("curves", curves.training(run), TRAINING), Picture("speed", curves.speed(run), SPEED)]
        if run.metrics
        else []
    )
    if run.samples:
        title = f"{run.name}: how busy the machine was ({run.facts['device']})"
        found.append(Picture("utilisation", utilisation(run.samples, title), MACHINE))
    return found + (_of_data(run, seen) if seen else [])


def _of_data(run: RunData, seen: SplitAnalysis) -> list[Picture]:
    names = run.facts["dataset"]["classes"]
    of = "the held-out part" if seen.split == "validation" else "the test split"
    title = f"{run.name}: {100 * seen.accuracy:.2f}% on {of}"
    found = [Picture("classes", classes.accuracies(seen.confusion, names, title), "")]
    by_group = classes.superclass_confusion(seen.confusion, names, f"{title}, by superclass of CIFAR-100")
    if by_group is not None:
        found.append(
            Picture(
                "superclasses",
                by_group,
                "Each superclass is five classes; the diagonal counts what stays inside a superclass.",
            )
        )
    found.append(Picture("confusion", classes.confusion(seen.confusion, names, title), MATRIX))
    if seen.mistakes:
        found.append(
            Picture(
                "mistakes",
                images.most_wrong(seen.mistakes, f"{run.name}: the images of {of} with the highest loss"),
                "What it is → what the network takes it for, and how surely. Some labels may be wrong.",
            )
        )
    if not isinstance(seen.attention, str):
        found.append(
            Picture(
                "attention",
                images.attention(*seen.attention, f"{run.name}: which patches are looked at"),
                "Mean over the heads of what the class token attends to, or, without one, of what all patches attend to.",
            )
        )
    return found
