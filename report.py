"""Pictures of runs, from the files of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def draw_curves(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and accuracy over the epochs."""
    plt = _pyplot()
    epochs = [line["epoch"] for line in metrics]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(epochs, [line["train_loss"] for line in metrics], color=BLUE, marker=".", label="training (augmented)")
    for split, color in (("validation", GREEN), ("test", ORANGE)):
        lines = [line for line in metrics if f"{split}_loss" in line]
        if lines:
            at = [line["epoch"] for line in lines]
            left.plot(at, [line[f"{split}_loss"] for line in lines], color=color, marker=".", label=split)
            right.plot(at, [100 * line[f"{split}_accuracy"] for line in lines], color=color, marker=".", label=f"{split}, top 1")
            right.plot(at, [100 * line[f"{split}_top5_accuracy"] for line in lines], color=color, ls="--", label=f"{split}, top 5")
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)")
    right.set(xlabel="epoch", ylabel="accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if axes.lines:
            axes.legend(frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def draw_confusion(matrix: np.ndarray, classes: list[str], path: Path, title: str) -> None:
    """Confusion matrix, rows true and columns predicted, each row in per cent of its class."""
    plt = _pyplot()
    K = len(classes)
    side = min(16, 3 + 0.16 * K) if K > 20 else 3 + 0.35 * K
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    shown = axes.imshow(100 * matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True)), cmap="Blues", vmin=0, vmax=100)
    font = 8 if K <= 20 else max(3.5, 500 / K)
    axes.set_xticks(range(K), classes, rotation=90, fontsize=font)
    axes.set_yticks(range(K), classes, fontsize=font)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    figure.colorbar(shown, label="% of the true class", shrink=0.7)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)


def draw_images(grid: np.ndarray, path: Path, title: str) -> None:
    """A grid of images, uint8 (rows, columns, S, S, 3)."""
    plt = _pyplot()
    rows, columns, S = grid.shape[:3]
    gap = max(1, S // 16)
    padded = np.pad(grid, ((0, 0), (0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255)
    picture = padded.transpose(0, 2, 1, 3, 4).reshape(rows * (S + gap), columns * (S + gap), 3)
    figure, axes = plt.subplots(figsize=(0.7 * columns, 0.7 * rows + 0.4), layout="constrained")
    axes.imshow(picture, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title)
    _save(figure, path)
