"""Pictures of runs, from the files of a run folder."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
SKY, PURPLE, AMBER, BLACK = "#56B4E9", "#CC79A7", "#E69F00", "#000000"


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


def draw_arm_accuracy(accuracies: dict[str, list[float]], path: Path, title: str, label: str) -> None:
    """Every seed's accuracy as a dot, mean and standard deviation beside it, one row an arm; the first arm's mean as a line."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.42 * len(accuracies)), layout="constrained")
    for row, values in enumerate(accuracies.values()):
        color = BLACK if row == 0 else BLUE
        offsets = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(values, row + 0.15 + offsets, ls="", marker="o", ms=5, color=color, alpha=0.5, mew=0)
        axes.errorbar(np.mean(values), row - 0.2, xerr=np.std(values, ddof=1) if len(values) > 1 else None, color=color, marker="D", ms=5, capsize=3)
    if accuracies:
        axes.axvline(np.mean(next(iter(accuracies.values()))), color=BLACK, lw=0.8, ls=":", zorder=0)
    axes.set_yticks(range(len(accuracies)), list(accuracies))
    axes.set(xlabel=f"{label}: dots are seeds, diamonds their mean ± sd", ylim=(len(accuracies) - 0.5, -0.5))
    axes.grid(alpha=0.3, axis="x")
    _title(figure, title)
    _save(figure, path)


def draw_accuracy_against(arms: dict[str, dict[str, Any]], path: Path, title: str, label: str) -> None:
    """Mean accuracy (± sd) against each cost. `arms`: name -> {"accuracy": every seed's, and each cost by its name}."""
    plt = _pyplot()
    costs = [cost for cost in next(iter(arms.values()), {"accuracy": [], "cost": 0}) if cost != "accuracy"]
    units = {"parameters": "parameters (millions)"}
    figure, panels = plt.subplots(1, len(costs), figsize=(4 * len(costs) + 2, 4.2), layout="constrained", sharey=True, squeeze=False)
    for axes, cost in zip(panels[0], costs, strict=True):
        for (name, arm), (color, marker) in zip(arms.items(), _styles(), strict=False):
            sd = np.std(arm["accuracy"], ddof=1) if len(arm["accuracy"]) > 1 else None
            axes.errorbar(arm[cost], np.mean(arm["accuracy"]), yerr=sd, color=color, marker=marker, ms=8, ls="", lw=1, label=name, mec="white")
        low, high = (limit((arm[cost] for arm in arms.values()), default=1.0) for limit in (min, max))
        spare = max(0.12 * (high - low), (0.3 * high - (high - low)) / 2)  # costs that are nearly equal should look so
        axes.set(xlabel=units.get(cost, cost), xlim=(low - spare, high + spare))
        axes.grid(alpha=0.3)
    panels[0, 0].set(ylabel=label)
    if arms:
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    _title(figure, title)
    _save(figure, path)


def draw_arm_curves(curves: dict[str, tuple[list[float], list[list[float]]]], path: Path, title: str, label: str) -> None:
    """Accuracy over the epochs: a panel for each arm, mean and ± sd of its seeds, with the first arm in black beside it.

    `curves`: arm -> epochs, and the accuracies there, one list a seed.
    """
    plt = _pyplot()
    others = list(curves.items())[1:] or list(curves.items())
    columns = min(4, max(1, len(others)))
    rows = max(1, -(-len(others) // columns))
    figure, panels = plt.subplots(rows, columns, figsize=(max(5.5, 3.2 * columns), 2.7 * rows + 1), layout="constrained", sharex=True, sharey=True,
                                  squeeze=False)
    for axes in panels.flat[len(others):]:
        axes.set_axis_off()
    for axes, (name, curve) in zip(panels.flat, others, strict=False):
        first = next(iter(curves))
        for arm, (epochs, values), color in ((first, curves[first], BLACK), (name, curve, BLUE)):
            mean, sd = np.mean(values, axis=0), np.std(values, axis=0, ddof=1) if len(values) > 1 else 0.0
            axes.plot(epochs, mean, color=color, label=arm, marker="." if len(epochs) < 20 else "")
            axes.fill_between(epochs, mean - sd, mean + sd, color=color, alpha=0.2, lw=0)
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.tick_params(labelbottom=True)
    if others:
        panels[0, 0].legend([panels[0, 0].lines[0]], [first], frameon=False, fontsize=9)
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel(label, fontsize=10)
    _title(figure, title)
    _save(figure, path)


def _styles() -> list[tuple[str, str]]:
    """A colour and a marker for each arm; the first is black."""
    return [(BLACK, "D")] + [(color, marker) for marker in "os^vP" for color in (BLUE, ORANGE, GREEN, SKY, PURPLE, AMBER)]


def _title(figure: Any, title: str) -> None:
    """A title that may be a long sentence, wrapped to the picture's width."""
    figure.suptitle("\n".join(textwrap.wrap(title, int(11 * figure.get_figwidth()))), fontsize=11)
