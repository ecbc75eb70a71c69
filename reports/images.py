"""Figures of images: a grid, the misclassified images of the highest loss, attention maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from common.display import printable
from common.text import shorten
from reports.style import make_figure, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from reports.predictions import Mistake

MISTAKES_PER_ROW = 6
MAX_BLOCKS = 6  # of a deep network, the first, the last and some between are drawn


def tile(grid: np.ndarray) -> np.ndarray:
    """Return images uint8 (rows, columns, S, S, 3) side by side on white: uint8 (height, width, 3)."""
    rows, columns, S = grid.shape[:3]
    gap = max(1, S // 16)
    padded = np.pad(grid, ((0, 0), (0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255)
    return padded.transpose(0, 2, 1, 3, 4).reshape(rows * (S + gap), columns * (S + gap), 3)


def image_grid(grid: np.ndarray, title: str) -> Figure:
    """Draw a grid of images, uint8 (rows, columns, S, S, 3)."""
    rows, columns = grid.shape[:2]
    figure, ((axes,),) = make_figure(0.7 * columns, 0.7 * rows + 0.4)
    axes.imshow(tile(grid), interpolation="nearest")
    axes.set_axis_off()
    set_title(figure, title)
    return figure


def most_wrong(mistakes: list[Mistake], title: str) -> Figure:
    """Draw misclassified images, each with its true label, its predicted label and the confidence."""
    rows = max(1, -(-len(mistakes) // MISTAKES_PER_ROW))
    figure, panels = make_figure(1.75 * MISTAKES_PER_ROW, 2.12 * rows + 0.4, rows, MISTAKES_PER_ROW)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, mistake in zip(panels.flat, mistakes, strict=False):
        axes.imshow(mistake.pixels, interpolation="nearest")
        true, predicted = shorten(printable(mistake.true), 20), shorten(printable(mistake.predicted), 16)
        axes.set_title(f"{true}\n→ {predicted} {100 * mistake.probability:.0f}%", fontsize=8)
    set_title(figure, title)
    return figure


def attention(pixels: np.ndarray, maps: np.ndarray, names: list[str], title: str) -> Figure:
    """Draw each image and next to it the attention that its patches receive in some of the blocks.

    Args:
        pixels: uint8 (B, S, S, 3).
        maps: (blocks, B, grid, grid). The mean of each map is 1, so uniform attention is 1 everywhere.
        names: class of each image.
    """
    blocks = np.unique(np.linspace(0, len(maps) - 1, min(len(maps), MAX_BLOCKS)).round().astype(int))
    figure, panels = make_figure(1.5 * (len(blocks) + 1) + 1.6, 1.55 * len(pixels) + 0.7, len(pixels), len(blocks) + 1)
    highest = max(2.0, float(np.quantile(maps[blocks], 0.995)))
    for row, (image, name) in enumerate(zip(pixels, names, strict=True)):
        panels[row, 0].imshow(image, interpolation="nearest")
        panels[row, 0].set_ylabel(shorten(printable(name), 16), fontsize=8)
        for axes, block in zip(panels[row, 1:], blocks, strict=True):
            shown = axes.imshow(maps[block, row], cmap="cividis", vmin=0, vmax=highest, interpolation="nearest")
            axes.set_title(f"block {block + 1}" if row == 0 else "", fontsize=9)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.colorbar(shown, ax=panels, label="attention per patch (1: uniform)", shrink=0.6)
    set_title(figure, title)
    return figure
