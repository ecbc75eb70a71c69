"""The list of pictures of a run: some from its metrics alone, others from the predictions of its network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from common.display import printable
from models.calibration import Calibration
from records.run_data import RunData
from reports import classes, curves, gradients, images
from reports.calibration import RELIABILITY, reliability
from reports.utilization import utilization

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from reports.predictions import Mistake

AUGMENTATIONS = ("resized_crop", "crop_padding", "flip", "brightness", "contrast", "saturation", "erasing")
SPEED = "Seconds of evaluation and of writing checkpoints are not included."
ROWS = "Rows sum to 100 %."
SMALL_NAMES = " Class names that are too small here are readable in pictures/confusion.svg."
MACHINE = (
    "One sample every two seconds, fewer after the first hour, of the machine of the main process, without the time "
    "when the run was stopped. Bands: range of the samples that one point stands for."
)


@dataclass(frozen=True)
class SplitAnalysis:
    """The predictions of a network on one split, summarized.

    Attributes:
        split: "test" or "validation".
        confusion: counts (K, K), rows true and columns predicted.
        attention: pixels, maps and class names for `images.attention`, or the reason why there is no attention map.
        calibration: confidence and accuracy by bin, None where it was not measured.
    """

    split: str
    confusion: np.ndarray
    mistakes: list[Mistake]
    attention: tuple[np.ndarray, np.ndarray, list[str]] | str
    calibration: Calibration | None = None

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / self.confusion.sum())


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file without suffix, and its caption."""

    name: str
    figure: Figure
    caption: str


def pictures_of(run: RunData, analysis: SplitAnalysis | None) -> list[Picture]:
    """Return every picture of the run; those that need predictions only with `analysis`."""
    found = []
    if run.metrics:
        found.append(Picture("curves", curves.training(run), training_caption(run)))
        found.append(Picture("speed", curves.speed(run), SPEED))
    if (figure := gradients.gradients(run)) is not None:
        found.append(Picture("gradients", figure, gradients.CAPTION))
    if run.samples:
        title = f"{printable(run.name)}: hardware utilization ({run.facts['device']})"
        found.append(Picture("utilisation", utilization(run.samples, title), MACHINE))
    return found + (_of_predictions(run, analysis) if analysis else [])


def training_caption(run: RunData) -> str:
    """Return a sentence about the training loss that names the regularization that this run used."""
    settings = run.facts["settings"]
    augmentation, ema = settings.get("augmentation", {}), settings.get("ema", {})
    used = {
        "augmented images": any(augmentation.get(key) for key in AUGMENTATIONS)
        or augmentation.get("policy", "none") != "none",
        "mixed labels (MixUp, CutMix)": augmentation.get("mixup") or augmentation.get("cutmix"),
        "label smoothing": settings.get("loss", {}).get("label_smoothing"),
        "dropout": settings["model"].get("dropout"),
        "stochastic depth": settings["model"].get("drop_path"),
    }
    names = [name for name, is_used in used.items() if is_used]
    how = f" with {', '.join(names)}, so it may lie above the others" if names else ""
    average = " The accuracy is that of the EMA weights." if ema.get("decay") else ""
    what = "The training loss is the mean over the steps since the point before, measured while the weights change"
    return f"{what}{how}.{average}"


def _of_predictions(run: RunData, analysis: SplitAnalysis) -> list[Picture]:
    names, run_name = run.facts["dataset"]["classes"], printable(run.name)
    of = "the validation split" if analysis.split == "validation" else "the test split"
    title = f"{run_name}: {100 * analysis.accuracy:.2f} % accuracy on {of}"
    found = [Picture("classes", classes.accuracies(analysis.confusion, names, title), "")]
    by_group = classes.superclass_confusion(analysis.confusion, names, f"{title}, by superclass of CIFAR-100")
    if by_group is not None:
        caption = "Each superclass has five classes. The diagonal includes confusions within a superclass."
        found.append(Picture("superclasses", by_group, caption))
    caption = ROWS + SMALL_NAMES * (len(names) <= classes.MAX_NAMES)
    found.append(Picture("confusion", classes.confusion(analysis.confusion, names, title), caption))
    if analysis.calibration is not None:
        title = f"{run_name}: calibration on {of}"
        found.append(Picture("reliability", reliability(analysis.calibration, title), RELIABILITY))
    if analysis.mistakes:
        title = f"{run_name}: misclassified images of {of} with the highest loss"
        caption = "True label → predicted label (confidence). Some true labels may be wrong."
        found.append(Picture("mistakes", images.most_wrong(analysis.mistakes, title), caption))
    if not isinstance(analysis.attention, str):
        title = f"{run_name}: attention maps"
        caption = "Mean over the heads of the attention of the CLS token or, without one, of all patches."
        found.append(Picture("attention", images.attention(*analysis.attention, title), caption))
    return found
