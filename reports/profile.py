"""The memory timeline of profiled steps (`train.py --profile N`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.style import BLUE, GRAY, finish, make_figure, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def memory(steps: list[float], points: list[tuple[float, float]], device: str) -> Figure:
    """Draw memory over time.

    Args:
        steps: starts of the steps, in ms; vertical lines.
        points: (ms, MiB), in order of time.
    """
    figure, ((axes,),) = make_figure(10, 3.5)
    times, values = zip(*points, strict=True)
    axes.plot(times, values, drawstyle="steps-post", color=BLUE, lw=1)
    axes.fill_between(times, values, min(0.0, *values), step="post", color=BLUE, alpha=0.15, lw=0)
    for start in steps:
        axes.axvline(start, color=GRAY, lw=0.8, ls=":")
    label = "allocated (MiB)" if device == "GPU" else "change of allocated memory (MiB)"
    finish(axes, xlabel="time (ms)", ylabel=label, xlim=(0, max(times)))
    set_title(figure, f"{device} memory over {len(steps)} training steps (dotted: start of a step)")
    return figure
