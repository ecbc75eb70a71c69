"""What all pictures share: colours, words for long spans of time, how a figure is made and written.

Figures are made without pyplot, which keeps every figure it ever made and looks for a screen.
"""

from __future__ import annotations

import base64
import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart (https://jfly.uni-koeln.de/color/).
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
SKY, PURPLE, AMBER, BLACK = "#56B4E9", "#CC79A7", "#E69F00", "#000000"
GREY = "#777777"  # behind the others
COLOURS = [BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK]
SPLITS = {"validation": ("held-out part", GREEN), "test": ("test", ORANGE)}
DPI = 110


def make_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes, an array (rows, columns)."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "runs"  # the same figure gives the same SVG
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure; the ending says whether as PNG or SVG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def embed(figure: Figure) -> str:
    """The figure as a data URI, SVG: it stays sharp in a page, and needs no file beside it."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def set_title(figure: Figure, title: str) -> None:
    """A title that may be a long sentence, wrapped to the picture's width."""
    figure.suptitle("\n".join(textwrap.wrap(title, int(11 * figure.get_figwidth()))), fontsize=11)


def finish(axes: Any, **labels: Any) -> None:
    """Labels, a light grid, no box; a legend where there is something to tell apart."""
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=9)


def whole_epochs(axes: Any, last: float) -> None:
    """An axis of epochs from 0 to `last`, with marks at whole numbers where there are at least two."""
    axes.set(xlabel="epoch", xlim=(0, last * 1.02))
    axes.xaxis.get_major_locator().set_params(integer=last >= 2)


def in_time_unit(seconds: list[float]) -> tuple[list[float], str]:
    """The same times in the unit that suits the longest of them, and its name."""
    longest = max(seconds, default=0.0)
    size, name = next(
        (size, name)
        for limit, size, name in ((180, 1, "seconds"), (3 * 3600, 60, "minutes"), (float("inf"), 3600, "hours"))
        if longest <= limit
    )
    return [value / size for value in seconds], name
