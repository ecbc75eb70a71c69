"""Figure of the hardware utilization during a run: GPU and CPU load, and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from reports.style import BLACK, COLORS, GRAY, finish, in_time_unit, make_figure, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 400  # with more samples, neighbors are drawn as their mean and range
MAX_GPUS = 6  # with more GPUs, their mean and range are drawn


def by_gpu(samples: list[list[float | None]]) -> np.ndarray:
    """Return the samples as an array (samples, GPUs), with NaN where a GPU reports nothing or is absent.

    The number of GPUs changes where a run is resumed on another machine.
    """
    gpus = np.full((len(samples), max(map(len, samples), default=0)), np.nan)
    for row, sample in zip(gpus, samples, strict=True):
        row[: len(sample)] = [np.nan if value is None else value for value in sample]
    return gpus


def utilization(samples: list[dict[str, Any]], title: str) -> Figure:
    """Draw load and memory over the running time of the run, without the time when it was stopped; one line per GPU.

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
        if gpus.size and gpus.shape[1] > MAX_GPUS:
            _draw(axes, times, gpus, COLORS[0], f"{gpus.shape[1]} GPUs, mean and range")
        else:
            for i in range(gpus.shape[1] if gpus.size else 0):
                _draw(axes, times, gpus[:, i : i + 1], COLORS[i], f"GPU {i}")
        _draw(
            axes,
            times,
            np.array([[sample[cpu_key]] for sample in samples], dtype=float),
            GRAY if gpus.size else COLORS[0],
            cpu,
        )
    _draw(
        memory, times, np.array([[sample["process_ram_gib"]] for sample in samples]), BLACK, "RAM of the main process"
    )
    finish(busy, ylabel="load (%)", ylim=(0, 105))
    finish(memory, ylabel="memory used (GiB)", xlabel=f"running time ({unit})", xlim=(0, max(times) or 1))
    memory.set_ylim(0, 1.08 * memory.get_ylim()[1])
    for axes in (busy, memory):
        if legend := axes.get_legend():
            legend.remove()
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    set_title(figure, title)
    return figure


def _draw(axes: Any, times: list[float], values: np.ndarray, color: str, label: str) -> None:
    """Draw the mean of `values` (samples, devices) over bins of time, and the range as a band."""
    x, mean, low, high = binned(np.array(times), values)
    if np.isnan(mean).all():
        return
    front = color != GRAY
    axes.plot(
        x, mean, color=color, lw=1.5 if front else 1, label=label, marker="o" if len(x) == 1 else "", zorder=3 + front
    )
    if (high > low).any():
        axes.fill_between(x, low, high, color=color, alpha=0.18, lw=0, zorder=1 + front)


def binned(
    times: np.ndarray, values: np.ndarray, most: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Average neighboring samples into at most `most` bins.

    Args:
        values: (samples, devices), NaN where unknown.

    Returns:
        Mean time, mean, minimum and maximum of each bin.
    """
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
