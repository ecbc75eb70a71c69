"""Picture of what the machine did during a run: how busy GPUs and CPU were, and the memory they used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from reports.style import BLACK, COLOURS, GREY, finish, in_time_unit, make_figure, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 400  # more than that, and neighbouring samples are drawn as their mean within their range
MOST_GPUS = 6  # more than that, and they are drawn as their mean within their range


def by_gpu(samples: list[list[float | None]]) -> np.ndarray:
    """Samples of as many GPUs as there were: (samples, GPUs), NaN where a GPU did not say or was not there.

    A run that was resumed on another machine has seen other numbers of GPUs.
    """
    gpus = np.full((len(samples), max(map(len, samples), default=0)), np.nan)
    for row, sample in zip(gpus, samples, strict=True):
        row[: len(sample)] = [np.nan if value is None else value for value in sample]
    return gpus


def utilisation(samples: list[dict[str, Any]], title: str) -> Figure:
    """Busy time and memory over the time the run was running (stops are left out); one line a GPU.

    Args:
        samples: lines of utilisation.jsonl, at least one.
    """
    figure, ((busy,), (memory,)) = make_figure(10, 5, 2, 1, sharex=True)
    times, unit = in_time_unit([sample["seconds"] for sample in samples])
    panels = (
        (busy, "gpu_percent", "cpu_percent", "CPU, all cores"),
        (memory, "gpu_memory_gib", "ram_gib", "RAM of the machine"),
    )
    for axes, gpu_key, cpu_key, cpu in panels:
        gpus = by_gpu([sample[gpu_key] for sample in samples])
        if gpus.size and gpus.shape[1] > MOST_GPUS:
            _draw(axes, times, gpus, COLOURS[0], f"{gpus.shape[1]} GPUs, mean and range")
        else:
            for i in range(gpus.shape[1] if gpus.size else 0):
                _draw(axes, times, gpus[:, i : i + 1], COLOURS[i], f"GPU {i}")
        _draw(
            axes,
            times,
            np.array([[sample[cpu_key]] for sample in samples], dtype=float),
            GREY if gpus.size else COLOURS[0],
            cpu,
        )
    _draw(
        memory, times, np.array([[sample["process_ram_gib"]] for sample in samples]), BLACK, "RAM of the main process"
    )
    finish(busy, ylabel="busy (%)", ylim=(0, 105))
    finish(memory, ylabel="memory used (GiB)", xlabel=f"{unit} of running", xlim=(0, max(times) or 1))
    memory.set_ylim(0, 1.08 * memory.get_ylim()[1])
    for axes in (busy, memory):
        if legend := axes.get_legend():
            legend.remove()
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    set_title(figure, title)
    return figure


def _draw(axes: Any, times: list[float], values: np.ndarray, colour: str, label: str) -> None:
    """The mean of `values` (samples, devices) over bins of time, and the range around it where there is one."""
    x, mean, low, high = binned(np.array(times), values)
    if np.isnan(mean).all():
        return
    front = colour != GREY
    axes.plot(
        x, mean, color=colour, lw=1.5 if front else 1, label=label, marker="o" if len(x) == 1 else "", zorder=3 + front
    )
    if (high > low).any():
        axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0, zorder=1 + front)


def binned(
    times: np.ndarray, values: np.ndarray, most: int = MOST_POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Times, means, minima and maxima of at most `most` bins of neighbouring samples; `values` (samples, devices)."""
    every = -(-len(times) // most)
    parts = [slice(i, i + every) for i in range(0, len(times), every)]
    known = [values[part][~np.isnan(values[part])] for part in parts]
    known = [part if part.size else np.array([np.nan]) for part in known]
    return (
        np.array([times[part].mean() for part in parts]),
        np.array([part.mean() for part in known]),
        np.array([part.min() for part in known]),
        np.array([part.max() for part in known]),
    )
