"""Pictures of which classes a network knows: accuracy of each, and what it takes for what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.text import shorten
from reports.cifar100_superclasses import groups_of
from reports.style import BLUE, ORANGE, finish, make_figure, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN = 50  # classes under one another
MOST_BARS = 100  # classes that get a bar each; of more, the best and the worst
MOST_NAMES = 120  # classes that can be named along an axis
COUNTED_UP_TO = 25  # classes: with more, numbers in the cells of a matrix cannot be read


def wilson(correct: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a share by Wilson (https://doi.org/10.1080/01621459.1927.10502953), for counts of any size."""
    z, seen = 1.96, np.maximum(1, seen)
    share = correct / seen
    middle = (share + z**2 / (2 * seen)) / (1 + z**2 / seen)
    half = z / (1 + z**2 / seen) * np.sqrt(share * (1 - share) / seen + z**2 / (4 * seen**2))
    return np.maximum(0, middle - half), np.minimum(1, middle + half)


def order_of_bars(accuracy: np.ndarray, classes: list[str]) -> list[tuple[str, list[int]]]:
    """Groups of labels from top to bottom: superclasses where there are, the worst first; else one group, sorted; the ends of a long one."""
    groups = groups_of(classes)
    if groups:
        ordered = sorted(groups.items(), key=lambda item: accuracy[item[1]].mean())
        return [(name, sorted(members, key=lambda label: accuracy[label])) for name, members in ordered]
    ranked = np.argsort(accuracy, kind="stable").tolist()
    if len(ranked) > MOST_BARS:
        return [(f"the {COLUMN} worst of {len(ranked)}", ranked[:COLUMN]), (f"the {COLUMN} best", ranked[-COLUMN:])]
    return [("", ranked)]


def accuracies(confusion: np.ndarray, classes: list[str], title: str) -> Figure:
    """A bar for each class, in per cent, with its 95 % interval; CIFAR-100 by superclass, the worst first.

    Args:
        confusion: counts (K, K), rows true and columns predicted.
    """
    seen, correct = confusion.sum(axis=1), np.diag(confusion)
    accuracy = correct / np.maximum(1, seen)
    low, high = wilson(correct, seen)
    rows: list[int | str] = []  # labels, and names of groups above theirs
    for name, members in order_of_bars(accuracy, classes):
        rows += ([name] if name else []) + members
    columns = _columns(rows)
    longest = max(len(column) for column in columns)
    figure, panels = make_figure(
        5.4 * len(columns) + (2 if len(columns) == 1 else 0), 1.2 + 0.2 * longest, 1, len(columns), sharex=True
    )
    for axes, column in zip(panels[0], columns, strict=True):
        at = np.array([i for i, row in enumerate(column) if not isinstance(row, str)])
        labels = [row for row in column if not isinstance(row, str)]
        axes.barh(at, 100 * accuracy[labels], color=BLUE, height=0.7)
        axes.hlines(at, 100 * low[labels], 100 * high[labels], color="0.15", lw=1)
        axes.axvline(100 * correct.sum() / max(1, seen.sum()), color=ORANGE, lw=1.2, ls="--")
        axes.set_yticks(
            range(len(column)),
            [row if isinstance(row, str) else shorten(classes[row], 28) for row in column],
            fontsize=8,
        )
        for text, row in zip(axes.get_yticklabels(), column, strict=True):
            text.set_fontweight("bold" if isinstance(row, str) else "normal")
        axes.tick_params(axis="y", length=0)
        finish(axes, xlabel="accuracy (%)", xlim=(0, 100), ylim=(longest - 0.4, -0.6))
        axes.grid(visible=False, axis="y")
    set_title(figure, f"{title}, by class. Dark lines: 95% intervals. Dashed: all classes.")
    return figure


def _columns(rows: list[int | str]) -> list[list[int | str]]:
    """Rows cut into columns of about COLUMN, each beginning with a group's name where there are groups."""
    if len(rows) <= COLUMN + 10:
        return [rows]
    starts = [i for i, row in enumerate(rows) if isinstance(row, str)] or [len(rows) // 2]
    cut = min(starts, key=lambda i: abs(i - len(rows) / 2))
    return [rows[:cut], rows[cut:]]


def confusion(matrix: np.ndarray, classes: list[str], title: str) -> Figure:
    """The confusion matrix, rows true and columns predicted, in per cent of the true class; CIFAR-100 in the order of its superclasses."""
    groups = groups_of(classes)
    order = [label for members in groups.values() for label in members] if groups else list(range(len(classes)))
    percent = 100 * matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    K = len(classes)
    side = 2.2 + 0.4 * K if K <= COUNTED_UP_TO else min(16.0, 2.6 + 0.13 * K)
    figure, ((axes,),) = make_figure(side + (3.6 if groups else 1), side)
    _cells(figure, axes, percent[np.ix_(order, order)])
    if K <= MOST_NAMES:
        _names(axes, [shorten(classes[label], 22) for label in order], 8.5 if K <= COUNTED_UP_TO else 6.5)
    else:
        axes.set_xlabel(f"predicted class (the {K} classes in the order of labels.txt)")
    if groups:
        _separate(axes, [len(members) for members in groups.values()], list(groups))
    set_title(figure, title)
    return figure


def superclass_confusion(matrix: np.ndarray, classes: list[str], title: str) -> Figure | None:
    """The same by superclass, 20 x 20; None where the classes are not CIFAR-100's."""
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
    """The matrix as colours (on a root scale: errors are small and matter), with numbers where they can be read."""
    from matplotlib.colors import PowerNorm

    shown = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    if len(percent) <= COUNTED_UP_TO:
        for (row, column), value in np.ndenumerate(percent):
            if value >= 0.5:
                axes.text(
                    column,
                    row,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if value > 40 else "black",
                )
    figure.colorbar(
        shown, ax=axes, label="% of the true class (root scale)", shrink=0.6, ticks=[0, 1, 5, 10, 25, 50, 100]
    )
    axes.set(xlabel="predicted class", ylabel="true class")


def _names(axes: Any, names: list[str], size: float) -> None:
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.tick_params(length=0)


def _separate(axes: Any, sizes: list[int], names: list[str]) -> None:
    """Lines between the groups, and their names on the right."""
    ends = np.cumsum(sizes)
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="0.75", lw=0.6)
        axes.axvline(end - 0.5, color="0.75", lw=0.6)
    right = axes.secondary_yaxis("right")
    right.set_yticks(ends - np.array(sizes) / 2 - 0.5, names, fontsize=8.5)
    right.tick_params(length=0)
