"""Pictures of a comparison (compare.py): accuracy of every arm and seed, accuracy against cost, curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from reports.style import AMBER, BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, make_figure, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"parameters": "parameters (millions)"}


def variant_accuracy(accuracies: dict[str, list[float]], title: str, label: str) -> Figure:
    """Every seed's accuracy as a dot, mean and standard deviation beside it, one row an arm; the first arm's mean as a line."""
    figure, ((axes,),) = make_figure(8, 1.4 + 0.42 * len(accuracies))
    for row, values in enumerate(accuracies.values()):
        color = BLACK if row == 0 else BLUE
        offsets = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(values, row + 0.15 + offsets, ls="", marker="o", ms=5, color=color, alpha=0.5, mew=0)
        axes.errorbar(
            np.mean(values),
            row - 0.2,
            xerr=np.std(values, ddof=1) if len(values) > 1 else None,
            color=color,
            marker="D",
            ms=5,
            capsize=3,
        )
    if accuracies:
        axes.axvline(np.mean(next(iter(accuracies.values()))), color=BLACK, lw=0.8, ls=":", zorder=0)
    axes.set_yticks(range(len(accuracies)), list(accuracies))
    axes.set(xlabel=f"{label}: dots are seeds, diamonds their mean ± sd", ylim=(len(accuracies) - 0.5, -0.5))
    axes.grid(alpha=0.3, axis="x")
    set_title(figure, title)
    return figure


def accuracy_against(arms: dict[str, dict[str, Any]], title: str, label: str) -> Figure:
    """Mean accuracy (± sd) against each cost. `arms`: name -> {"accuracy": every seed's, and each cost by its name}."""
    costs = [cost for cost in next(iter(arms.values()), {"accuracy": [], "cost": 0}) if cost != "accuracy"]
    figure, panels = make_figure(4 * len(costs) + 2, 4.2, 1, len(costs), sharey=True)
    for axes, cost in zip(panels[0], costs, strict=True):
        for (name, arm), (color, marker) in zip(arms.items(), _styles(), strict=False):
            sd = np.std(arm["accuracy"], ddof=1) if len(arm["accuracy"]) > 1 else None
            axes.errorbar(
                arm[cost],
                np.mean(arm["accuracy"]),
                yerr=sd,
                color=color,
                marker=marker,
                ms=8,
                ls="",
                lw=1,
                label=name,
                mec="white",
            )
        low, high = (limit((arm[cost] for arm in arms.values()), default=1.0) for limit in (min, max))
        spare = max(0.12 * (high - low), (0.3 * high - (high - low)) / 2)  # costs that are nearly equal should look so
        axes.set(xlabel=UNITS.get(cost, cost), xlim=(low - spare, high + spare))
        axes.grid(alpha=0.3)
    panels[0, 0].set(ylabel=label)
    if arms:
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    set_title(figure, title)
    return figure


def variant_curves(curves: dict[str, tuple[list[float], list[list[float]]]], title: str, label: str) -> Figure:
    """Accuracy over the epochs: a panel for each arm, mean and ± sd of its seeds, with the first arm in black beside it.

    `curves`: arm -> epochs, and the accuracies there, one list a seed.
    """
    others = list(curves.items())[1:] or list(curves.items())
    columns = min(4, max(1, len(others)))
    rows = max(1, -(-len(others) // columns))
    figure, panels = make_figure(max(5.5, 3.2 * columns), 2.7 * rows + 1, rows, columns, sharex=True, sharey=True)
    for axes in panels.flat[len(others) :]:
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
    set_title(figure, title)
    return figure


def _styles() -> list[tuple[str, str]]:
    """A colour and a marker for each arm; the first is black."""
    return [(BLACK, "D")] + [
        (color, marker) for marker in "os^vP" for color in (BLUE, ORANGE, GREEN, SKY, PURPLE, AMBER)
    ]
