"""Reliability diagram: accuracy against confidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from models.calibration import Calibration
from reports.classes import wilson
from reports.style import BLUE, GRAY, INK, finish, make_figure, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RELIABILITY = (
    "Bars below the diagonal: the network is overconfident. Bars above it: underconfident. Thin lines: 95 % intervals. "
    "Lower panel: share of the predictions with that confidence."
)


def reliability(calibration: Calibration, title: str) -> Figure:
    """Draw the accuracy of the predictions by confidence, with the distribution of the confidence below it."""
    seen, correct = np.array(calibration.seen), np.array(calibration.correct)
    edges = np.linspace(0, 100, len(seen) + 1)
    width, middle, used = edges[1], (edges[:-1] + edges[1:]) / 2, seen > 0
    low, high = wilson(correct, seen)
    figure, ((top,), (bottom,)) = make_figure(5.5, 6, 2, 1, sharex=True, height_ratios=[3, 1])
    top.bar(middle[used], 100 * correct[used] / seen[used], 0.9 * width, color=BLUE)
    top.vlines(middle[used], 100 * low[used], 100 * high[used], color=INK, lw=1)
    top.plot([0, 100], [0, 100], color=GRAY, ls="--", lw=1)
    bottom.bar(middle, 100 * seen / max(1, seen.sum()), 0.9 * width, color=GRAY)
    finish(top, ylabel="accuracy (%)", ylim=(0, 100))
    finish(bottom, xlabel="confidence (%)", ylabel="predictions (%)", xlim=(0, 100))
    set_title(figure, f"{title}: expected calibration error {100 * calibration.expected_error:.2f} %")
    return figure
