"""Figures of a classification by class: the accuracy of each class, and confusion matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.display import printable
from common.text import shorten
from reports.cifar100_superclasses import groups_of
from reports.style import BLUE, INK, ORANGE, finish, make_figure, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN = 50  # classes per column of bars
MAX_BARS = 100  # with more classes, only the worst and the best get a bar
MAX_NAMES = 120  # with more classes, their names do not fit along an axis
MAX_NUMBERED = 25  # with more classes, numbers in the cells of a matrix are too small to read


def wilson(correct: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper end of Wilson's 95 % interval of a proportion; valid for counts of any size.

    E. B. Wilson, 1927: https://doi.org/10.1080/01621459.1927.10502953
    """
    z, seen = 1.96, np.maximum(1, seen)
    share = correct / seen
    middle = (share + z**2 / (2 * seen)) / (1 + z**2 / seen)
    half = z / (1 + z**2 / seen) * np.sqrt(share * (1 - share) / seen + z**2 / (4 * seen**2))
    return np.maximum(0, middle - half), np.minimum(1, middle + half)


def order_of_bars(accuracy: np.ndarray, classes: list[str]) -> list[tuple[str, list[int]]]:
    """Return named groups of labels, lowest accuracy first.

    The classes of CIFAR-100 are grouped by superclass. Other classes make one group, or with more than MAX_BARS classes
    two: the worst and the best.
    """
    groups = groups_of(classes)
    if groups:
        ordered = sorted(groups.items(), key=lambda item: accuracy[item[1]].mean())
        return [(name, sorted(members, key=lambda label: accuracy[label])) for name, members in ordered]
    ranked = np.argsort(accuracy, kind="stable").tolist()
    if len(ranked) > MAX_BARS:
        return [(f"the {COLUMN} worst of {len(ranked)}", ranked[:COLUMN]), (f"the {COLUMN} best", ranked[-COLUMN:])]
    return [("", ranked)]


def accuracies(confusion: np.ndarray, classes: list[str], title: str) -> Figure:
    """Draw one bar per class, in percent, with its 95 % interval; CIFAR-100 by superclass, lowest accuracy first.

    Args:
        confusion: counts (K, K), rows true and columns predicted.
    """
    seen, correct = confusion.sum(axis=1), np.diag(confusion)
    accuracy = correct / np.maximum(1, seen)
    low, high = wilson(correct, seen)
    rows: list[int | str] = []  # labels, each group preceded by its name
    for name, members in order_of_bars(accuracy, classes):
        rows += [*([name] if name else []), *members]
    columns = _columns(rows)
    longest = max(len(column) for column in columns)
    figure, panels = make_figure(
        5.4 * len(columns) + (2 if len(columns) == 1 else 0), 1.2 + 0.2 * longest, 1, len(columns), sharex=True
    )
    for axes, column in zip(panels[0], columns, strict=True):
        at = np.array([i for i, row in enumerate(column) if not isinstance(row, str)])
        labels = [row for row in column if not isinstance(row, str)]
        axes.barh(at, 100 * accuracy[labels], color=BLUE, height=0.7)
        axes.hlines(at, 100 * low[labels], 100 * high[labels], color=INK, lw=1)
        axes.axvline(100 * correct.sum() / max(1, seen.sum()), color=ORANGE, lw=1.2, ls="--")
        axes.set_yticks(
            range(len(column)),
            [row if isinstance(row, str) else shorten(printable(classes[row]), 28) for row in column],
            fontsize=8,
        )
        for text, row in zip(axes.get_yticklabels(), column, strict=True):
            text.set_fontweight("bold" if isinstance(row, str) else "normal")
        axes.tick_params(axis="y", length=0)
        finish(axes, xlabel="accuracy (%)", xlim=(0, 100), ylim=(longest - 0.4, -0.6))
        axes.grid(visible=False, axis="y")
    set_title(figure, f"{title}, by class. Thin lines: 95 % intervals. Dashed: all classes.")
    return figure


def _columns(rows: list[int | str]) -> list[list[int | str]]:
    """Split the rows into columns of about COLUMN rows; with groups, each column starts with a group name."""
    if len(rows) <= COLUMN + 10:
        return [rows]
    starts = [i for i, row in enumerate(rows) if isinstance(row, str)] or [len(rows) // 2]
    cut = min(starts, key=lambda i: abs(i - len(rows) / 2))
    return [rows[:cut], rows[cut:]]


def confusion(matrix: np.ndarray, classes: list[str], title: str) -> Figure:
    """Draw the confusion matrix in percent of the true class: rows true, columns predicted.

    The classes of CIFAR-100 are ordered by superclass.

    Args:
        matrix: counts (K, K).
    """
    groups = groups_of(classes)
    order = [label for members in groups.values() for label in members] if groups else list(range(len(classes)))
    percent = 100 * matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    K = len(classes)
    side = 2.2 + 0.4 * K if K <= MAX_NUMBERED else min(16.0, 2.6 + 0.13 * K)
    figure, ((axes,),) = make_figure(side + (3.6 if groups else 1), side)
    _cells(figure, axes, percent[np.ix_(order, order)])
    if K <= MAX_NAMES:
        _names(axes, [shorten(printable(classes[label]), 22) for label in order], 8.5 if K <= MAX_NUMBERED else 6.5)
    else:
        axes.set_xlabel(f"predicted class (the {K} classes in the order of labels.txt)")
    if groups:
        _separate(axes, [len(members) for members in groups.values()], list(groups))
    set_title(figure, title)
    return figure


def superclass_confusion(matrix: np.ndarray, classes: list[str], title: str) -> Figure | None:
    """Draw the 20 x 20 confusion matrix of superclasses; None where the classes are not those of CIFAR-100."""
    groups = groups_of(classes)
    if groups is None:
        return None
    of = np.zeros((len(classes), len(groups)), dtype=matrix.dtype)
    for i, members in enumerate(groups.values()):
        of[members, i] = 1
    counts = of.T @ matrix @ of
    figure, ((axes,),) = make_figure(10.5, 9.5)
    _cells(figure, axes, 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True)))
    _names(axes, list(groups), 8.5)
    set_title(figure, title)
    return figure


def _cells(figure: Any, axes: Any, percent: np.ndarray) -> None:
    """Draw the matrix as colors, with numbers where they are large enough to read.

    The color scale is a square root, so that small error rates are visible. Low values are transparent, so that the
    figure has no white square in dark mode.
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    colors = LinearSegmentedColormap.from_list("transparent_to_blue", [(0.03, 0.4, 0.72, 0.0), (0.03, 0.4, 0.72, 1.0)])
    shown = axes.imshow(percent, cmap=colors, norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    if len(percent) <= MAX_NUMBERED:
        for (row, column), value in np.ndenumerate(percent):
            if value >= 0.5:
                axes.text(
                    column,
                    row,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if value > 40 else INK,
                )
    figure.colorbar(
        shown, ax=axes, label="% of the true class (square-root scale)", shrink=0.6, ticks=[0, 1, 5, 10, 25, 50, 100]
    )
    axes.set(xlabel="predicted class", ylabel="true class")


def _names(axes: Any, names: list[str], size: float) -> None:
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.tick_params(length=0)


def _separate(axes: Any, sizes: list[int], names: list[str]) -> None:
    """Draw lines between the groups, and their names on the right."""
    ends = np.cumsum(sizes)
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="0.75", lw=0.6)
        axes.axvline(end - 0.5, color="0.75", lw=0.6)
    right = axes.secondary_yaxis("right")
    right.set_yticks(ends - np.array(sizes) / 2 - 0.5, names, fontsize=8.5)
    right.tick_params(length=0)
