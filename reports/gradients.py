"""Gradient norms and update/weight ratios over the epochs of a run with `train.py --log-gradients`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.display import printable
from records.run_data import RunData, Series
from reports.style import INK, finish, make_figure, set_epoch_axis, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {"gradient_norm": "gradient norm before clipping", "update_ratio": "update norm / weight norm"}
NAMED_LAYERS = 12  # with more, the legend names the first and the last
CAPTION = (
    "One line per layer of the network, from the input (dark) to the output (light); black: the whole network. "
    "A layer whose ratio is far from the others' learns at another pace."
)


def layers_of(run: RunData, measure: str) -> list[str]:
    """Return the layers with a measure, from input to output."""
    names = {key: None for line in run.steps for key in line if key.startswith(f"{measure}/")}
    return [name.removeprefix(f"{measure}/") for name in names]


def series(run: RunData, key: str) -> Series:
    """Return epochs and the finite positive values of a key of steps.jsonl, which a logarithmic axis can show."""
    lines = [line for line in run.steps if 0 < line.get(key, 0) < float("inf")]
    return [line["step"] / run.facts["steps_per_epoch"] for line in lines], [line[key] for line in lines]


def gradients(run: RunData) -> Figure | None:
    """Draw the norms on the left and the ratios on the right; None for a run that did not measure them."""
    if not any("gradient_norm" in line for line in run.steps):
        return None
    import matplotlib
    from matplotlib.ticker import LogFormatter

    colors = matplotlib.colormaps["viridis"]
    figure, ((left, right),) = make_figure(11, 4.5, 1, 2)
    for axes, (measure, label) in zip((left, right), MEASURES.items(), strict=True):
        layers = layers_of(run, measure)
        for i, layer in enumerate(layers):
            is_named = len(layers) <= NAMED_LAYERS or i in (0, len(layers) - 1)
            color = colors(0.95 * i / max(1, len(layers) - 1))
            name = printable(layer.replace("_", " ")) if is_named else None
            axes.plot(*series(run, f"{measure}/{layer}"), color=color, lw=1, marker=".", ms=3, label=name)
        axes.plot(*series(run, measure), color=INK, lw=1.6, label="whole network")
        axes.set_yscale("log")
        # the usual one writes powers as formulas, which all figures turn off (reports/style.py)
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        set_epoch_axis(axes, run.last_epoch)
        finish(axes, ylabel=label)
        if axes.get_legend():
            axes.get_legend().remove()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    set_title(figure, f"{printable(run.name)}: gradients and updates by layer")
    return figure
