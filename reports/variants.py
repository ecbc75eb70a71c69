"""Pictures of a comparison (compare.py): paired differences, accuracy of every seed, accuracy against cost, curves.

`first` is the name of the variant that all others are compared with. It is black; without finished runs it is left out,
and no other variant takes its place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from reports.style import AMBER, BLACK, BLUE, GRAY, GREEN, ORANGE, PURPLE, SKY, make_figure, set_title, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"parameters": "parameters (millions)"}
LEGEND_LINE = 0.2  # inches of one name in a legend, upward
LEGEND_LETTER = 0.07  # inches of one letter in a legend, sideways


def paired_differences(
    differences: dict[str, dict[str, Any]], title: str, label: str, margin: float | None = None
) -> Figure:
    """Forest plot: one row per variant with mean, 95 % interval, every seed's paired difference, and the verdict.

    Args:
        differences: variant -> {"mean", "low", "high" (None for one seed), "seeds": one value per seed, "verdict",
            "is_confirmed"}, all in points.
        label: of the horizontal axis.
        margin: half the width of the shaded band of equivalence; None for no band.
    """
    figure, ((axes,),) = make_figure(8, 1.6 + 0.5 * max(1, len(differences)))
    if margin:
        axes.axvspan(-margin, margin, color=GRAY, alpha=0.15, lw=0, zorder=0)
    axes.axvline(0, color=BLACK, lw=1, zorder=1)
    for row, one in enumerate(differences.values()):
        color = (GREEN if one["mean"] > 0 else ORANGE) if one["is_confirmed"] else BLUE
        seeds = one["seeds"]
        axes.plot(seeds, [row + 0.24] * len(seeds), ls="", marker="|", ms=8, mew=1.2, color=color, alpha=0.6)
        if one["low"] is not None:
            axes.plot([one["low"], one["high"]], [row - 0.05] * 2, color=color, lw=2.2, solid_capstyle="butt")
        face = color if one["is_confirmed"] else "white"  # filled: confirmed; readable without color as well
        axes.plot([one["mean"]], [row - 0.05], marker="D", ms=6.5, color=color, mfc=face, mew=1.5)
        text = f"{one['mean']:+.2f}" + (f" ({one['low']:+.2f} to {one['high']:+.2f})" if one["low"] is not None else "")
        axes.annotate(
            f"{text}\n{one['verdict']}, n = {len(seeds)}",
            (1.01, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            annotation_clip=False,
        )
    axes.set_yticks(range(len(differences)), list(short_names(differences).values()), fontsize=9)
    axes.set(
        xlabel=f"{label}\ndiamond: mean, bar: 95 % interval, ticks: seeds", ylim=(max(1, len(differences)) - 0.5, -0.5)
    )
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    set_title(figure, title)
    return figure


def variant_accuracy(accuracies: dict[str, list[float]], first: str, title: str, label: str) -> Figure:
    """Plot every seed's accuracy as a dot next to mean and standard deviation, one row per variant.

    The mean of the first variant is a vertical line.
    """
    figure, ((axes,),) = make_figure(8, 1.4 + 0.42 * max(1, len(accuracies)))
    for row, (name, values) in enumerate(accuracies.items()):
        color = BLACK if name == first else BLUE
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
    if first in accuracies:
        axes.axvline(np.mean(accuracies[first]), color=BLACK, lw=0.8, ls=":", zorder=0)
    axes.set_yticks(range(len(accuracies)), list(short_names(accuracies).values()), fontsize=9)
    axes.set(xlabel=f"{label}; dots: seeds, diamonds: mean ± sd", ylim=(max(1, len(accuracies)) - 0.5, -0.5))
    axes.grid(alpha=0.3, axis="x")
    set_title(figure, title)
    return figure


def accuracy_against(variants: dict[str, dict[str, Any]], first: str, title: str, label: str) -> Figure:
    """Plot mean accuracy (± sd) against each cost, one panel per cost.

    Args:
        variants: variant -> {"accuracy": one value per seed, and each cost by its name}.
    """
    costs = [cost for cost in next(iter(variants.values()), {"accuracy": [], "cost": 0}) if cost != "accuracy"]
    names, styles = short_names(variants), _styles(variants, first)
    legend, height = _legend_width(names), max(4.2, 1 + LEGEND_LINE * len(variants))
    figure, panels = make_figure(4 * len(costs) + legend, height, 1, len(costs), sharey=True)
    for axes, cost in zip(panels[0], costs, strict=True):
        for name, variant in variants.items():
            color, marker = styles[name]
            sd = np.std(variant["accuracy"], ddof=1) if len(variant["accuracy"]) > 1 else None
            axes.errorbar(
                variant[cost],
                np.mean(variant["accuracy"]),
                yerr=sd,
                color=color,
                marker=marker,
                ms=8,
                ls="",
                lw=1,
                label=names[name],
                mec="white",
            )
        low, high = (limit((one[cost] for one in variants.values()), default=1.0) for limit in (min, max))
        spare = max(0.12 * (high - low), (0.3 * high - (high - low)) / 2)  # nearly equal costs are drawn close together
        axes.set(xlabel=UNITS.get(cost, cost), xlim=(low - spare, high + spare))
        axes.grid(alpha=0.3)
    panels[0, 0].set(ylabel=label)
    if variants:
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    set_title(figure, title, legend)
    return figure


def variant_curves(
    curves: dict[str, tuple[list[float], list[list[float]]]], first: str, title: str, label: str
) -> Figure:
    """Plot accuracy over epochs, one panel per variant: mean ± sd over seeds, with the first variant in black.

    Args:
        curves: variant -> epochs, and the accuracies at them, one list per seed.
    """
    others = [name for name in curves if name != first] or list(curves)
    names = short_names(curves)
    columns = min(4, max(1, len(others)))
    rows = max(1, -(-len(others) // columns))
    figure, panels = make_figure(max(5.5, 3.2 * columns), 2.7 * rows + 1, rows, columns, sharex=True, sharey=True)
    for axes in panels.flat[len(others) :]:
        axes.set_axis_off()
    for axes, name in zip(panels.flat, others, strict=False):
        for variant, color in ((first, BLACK), (name, BLUE)):
            if variant not in curves:
                continue
            epochs, values = curves[variant]
            mean = np.mean(values, axis=0)
            sd = np.std(values, axis=0, ddof=1) if len(values) > 1 else 0.0
            axes.plot(epochs, mean, color=color, label=names[variant], marker="." if len(epochs) < 20 else "")
            axes.fill_between(epochs, mean - sd, mean + sd, color=color, alpha=0.2, lw=0)
        axes.set_title(names[name], fontsize=10)
        axes.grid(alpha=0.3)
        axes.tick_params(labelbottom=True)
    if first in curves:
        panels[0, 0].legend([panels[0, 0].lines[0]], [names[first]], frameon=False, fontsize=8)
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel(label, fontsize=10)
    set_title(figure, title)
    return figure


def curves_by_cost(variants: dict[str, dict[str, Any]], first: str, title: str, label: str) -> Figure:
    """Plot accuracy over what training has cost, all variants in one panel per cost: mean and ± sd over seeds.

    Args:
        variants: variant -> {"accuracy": a list per seed, and each cost by its name: its value at each evaluation}.
    """
    costs = [cost for cost in next(iter(variants.values()), {}) if cost != "accuracy"] or ["cost"]
    columns = min(2, len(costs))
    rows = -(-len(costs) // columns)
    names, styles = short_names(variants), _styles(variants, first)
    legend, height = _legend_width(names), max(3 * rows, LEGEND_LINE * len(variants)) + 1
    figure, panels = make_figure(4.2 * columns + legend, height, rows, columns, sharey=True)
    for axes, cost in zip(panels.flat, costs, strict=False):
        for name, variant in variants.items():
            color, marker = styles[name]
            values = variant["accuracy"]
            mean = np.mean(values, axis=0)
            sd = np.std(values, axis=0, ddof=1) if len(values) > 1 else np.zeros_like(mean)
            marker = marker if len(mean) < 20 else ""
            axes.plot(variant[cost], mean, color=color, label=names[name], lw=1.3, marker=marker, ms=4)
            axes.fill_between(variant[cost], mean - sd, mean + sd, color=color, alpha=0.15, lw=0)
        axes.set(xlabel=cost)
        axes.grid(alpha=0.3)
    if variants:
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    figure.supylabel(label, fontsize=10)
    set_title(figure, title, legend)
    return figure


def _legend_width(names: dict[str, str]) -> float:
    return max(2.0, 0.6 + LEGEND_LETTER * max(map(len, names.values()), default=0))


def _styles(names: Iterable[str], first: str) -> dict[str, tuple[str, str]]:
    """Return name -> color and marker. Only the first variant is black; after 54 others, both are used again."""
    colors = (BLUE, ORANGE, GREEN, SKY, PURPLE, AMBER)
    styles = itertools.cycle([(color, marker) for marker in "os^vPX<>p" for color in colors])
    return {name: (BLACK, "D") if name == first else next(styles) for name in names}
