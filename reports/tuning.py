"""Picture of the tuning of a comparison (compare.py): accuracy of the candidates at each rung, a panel per variant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from reports.style import BLACK, GREEN, ORANGE, make_figure, set_title, short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIVERGED: dict[str, Any] = {"marker": "x", "ls": "", "color": ORANGE, "ms": 7, "mew": 2}


def candidate_accuracy(variants: dict[str, dict[str, Any]], candidates: list[str], title: str, label: str) -> Figure:
    """Plot the accuracy of each candidate: a line of means and a dot per seed for every rung, the darker the later.

    Args:
        variants: variant -> {"rungs": name of a rung -> {candidate: one accuracy per seed}, "diverged": the candidates
            that diverged with a seed, "chosen" and "shared": a candidate's index, or None}.
        candidates: their names, in order.
        label: of the vertical axis.
    """
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    columns = min(4, max(1, len(variants)))
    rows = max(1, -(-len(variants) // columns))
    size = (max(5.5, 3.2 * columns), 2.7 * rows + 1)
    figure, panels = make_figure(*size, rows, columns, sharex=True, sharey=True)
    names = list(dict.fromkeys(name for one in variants.values() for name in one["rungs"]))
    colors = dict(zip(names, colormaps["Blues"](np.linspace(1, 0.4, len(names)))[::-1], strict=True))
    panel_names, candidate_names = short_names(variants), list(short_names(candidates).values())
    for axes in panels.flat[len(variants) :]:
        axes.set_axis_off()
    for axes, (name, one) in zip(panels.flat, variants.items(), strict=False):
        if one["shared"] is not None:
            axes.axvline(one["shared"], color=BLACK, lw=0.8, ls=":", zorder=0)
        for rung, by_candidate in one["rungs"].items():
            places = sorted(by_candidate)
            axes.plot(places, [np.mean(by_candidate[i]) for i in places], color=colors[rung], marker=".", lw=1.5)
            for i in places:
                axes.plot([i] * len(by_candidate[i]), by_candidate[i], ls="", marker="_", color=colors[rung], alpha=0.6)
        axes.plot(
            one["diverged"],
            [0.04] * len(one["diverged"]),
            transform=axes.get_xaxis_transform(),  # at the bottom of the panel
            **DIVERGED,
        )
        if one["chosen"] is not None:
            last = next(rung for rung in reversed(list(one["rungs"].values())) if one["chosen"] in rung)
            axes.plot([one["chosen"]], [np.mean(last[one["chosen"]])], marker="D", ms=8, color=GREEN, ls="", zorder=5)
        axes.set_title(panel_names[name], fontsize=10)
        axes.set_xticks(range(len(candidates)), candidate_names, rotation=45 if len(candidates) > 3 else 20, ha="right")
        axes.set_xlim(-0.5, len(candidates) - 0.5)
        axes.tick_params(labelsize=8, labelbottom=True)
        axes.grid(alpha=0.3, axis="y")
    handles = [Line2D([], [], color=colors[name], marker=".", label=name) for name in names]
    handles.append(Line2D([], [], color=GREEN, marker="D", ls="", label="chosen"))
    if any(one["diverged"] for one in variants.values()):
        handles.append(Line2D([], [], label="diverged", **DIVERGED))
    if any(one["shared"] is not None for one in variants.values()):
        handles.append(Line2D([], [], color=BLACK, ls=":", lw=0.8, label="shared value"))
    fit = int(size[0] / 1.9)  # entries beside one another, in inches
    figure.legend(handles=handles, loc="outside lower center", ncols=min(fit, len(handles)), frameon=False, fontsize=9)
    figure.supylabel(label, fontsize=10)
    set_title(figure, title)
    return figure
