"""A profile of a few training steps (`train.py --profile N`): what the time and the memory of a step go to.

    python train.py --preset cpu --max-steps 30 --profile 5

The main process records N steps after those that compile or warm up, and writes into `profile/` of the run folder:
trace.json.gz, for https://ui.perfetto.dev; operations.txt, the most expensive operations; memory.png, the allocated
memory over the steps. Profiled steps are slower than others.
"""

from __future__ import annotations

import gzip
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from common.paths import near_path

WARM_UP_STEPS = 3  # besides those that compile: they allocate memory
SHOWN_OPERATIONS = 10
NAME_LENGTH = 60
FOLDER = "profile"
LABEL = "optimizer step"
ON_GPU = 1  # "Device Type" of memory events


class StepProfile:
    """Records steps of one process, once per start; without a folder, as outside the main process, it is idle."""

    def __init__(
        self, folder: Path | None, steps: int | None, first_steps: int, device: torch.device, say: Callable[[str], None]
    ):
        """`first_steps` compile or warm up; `steps` are recorded; `say` prints the table."""
        self.folder, self.steps, self.device, self.say = folder, steps or 0, device, say
        self.untimed = first_steps + WARM_UP_STEPS
        self.recorded = 0
        self._profiler: profile | None = None
        self._seconds = 0.0  # of writing
        self._is_done = folder is None or not steps

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Make step `number` inside."""
        if self._is_done:
            yield
            return
        if self.untimed:
            self.untimed -= 1
            yield
            return
        if self._profiler is None:
            self._start()
        with record_function(f"{LABEL} {number}"):
            yield
        self.recorded += 1
        if self.recorded == self.steps:
            self.finish()

    def finish(self) -> None:
        """Write what is recorded: after the last step to record, or where an epoch ends before it."""
        if self._profiler is None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        self._profiler.stop()
        assert self.folder is not None
        folder = self.folder / FOLDER
        folder.mkdir(exist_ok=True)
        table = operations(self._profiler, self.recorded, self.device)
        (folder / "operations.txt").write_text(table + "\n")
        self._profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        self._profiler, self._is_done = None, True
        self._draw(folder)
        self.say(f"{table}\nopen {near_path(folder / 'trace.json.gz')} at https://ui.perfetto.dev")
        self._seconds += time.perf_counter() - began

    def take_seconds(self) -> float:
        """Return the time that writing has taken since the last call, which is not training time."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Print why nothing was written, where nothing was."""
        if not self._is_done:
            self._is_done = True
            self.say("warning: --profile recorded nothing, because the run ended within its first steps; train longer")

    def _start(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports an error on a machine without a GPU
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            activities.append(ProfilerActivity.CUDA)
        # Where PyTorch has no such option, it keeps all events in any case.
        keeps: dict[str, Any] = {"acc_events": True} if "acc_events" in inspect.signature(profile).parameters else {}
        self._profiler = profile(activities=activities, profile_memory=True, **keeps)
        self._profiler.start()

    def _draw(self, folder: Path) -> None:
        from reports.profile import memory
        from reports.style import save

        steps, points = read_memory(folder / "trace.json.gz", on_gpu=self.device.type == "cuda")
        if points:
            save(memory(steps, points, "GPU" if self.device.type == "cuda" else "CPU"), folder / "memory.png")


def operations(profiler: profile, steps: int, device: torch.device) -> str:
    """Return a table of the most expensive operations: GPU kernels on a GPU, PyTorch's operations on a CPU."""
    on_gpu = device.type == "cuda"
    rows = []
    for event in profiler.key_averages():
        is_kernel = event.device_type != torch.autograd.DeviceType.CPU
        if event.key.startswith(LABEL) or is_kernel != on_gpu or getattr(event, "is_user_annotation", False):
            continue
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        rows.append((seconds, event.count, event.key))
    total = sum(seconds for seconds, _, _ in rows) or 1.0
    rows.sort(key=lambda row: (-row[0], row[2]))
    what = "GPU kernels" if on_gpu else "operations"
    lines = [
        f"profile of {steps} step{'s' * (steps != 1)}: {1000 * total / steps:,.1f} ms per step in {what}",
        f"{'ms/step':>9} {'share':>6} {'calls/step':>10}  name",
    ]
    for seconds, count, name in rows[:SHOWN_OPERATIONS]:
        short = name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 3] + "..."
        lines.append(f"{1000 * seconds / steps:9.2f} {100 * seconds / total:5.1f}% {count / steps:10.1f}  {short}")
    return "\n".join(lines)


def read_memory(trace: Path, on_gpu: bool) -> tuple[list[float], list[tuple[float, float]]]:
    """Read the memory events of a trace.

    Returns:
        The starts of the steps in ms since the first of them, and points (ms, MiB). On a GPU the points are the
        allocated memory. On a CPU, where PyTorch does not know the total, they are its change since the first step.
    """
    with gzip.open(trace, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    # on a GPU, a step has a second event in the GPU's timeline
    starts = sorted(
        event["ts"]
        for event in events
        if event.get("name", "").startswith(LABEL) and not event.get("cat", "").startswith("gpu")
    )
    found = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    points, allocated = [], 0.0
    for event in found:
        args = event["args"]
        if (args["Device Type"] == ON_GPU) != on_gpu:
            continue
        allocated = args["Total Allocated"] if on_gpu else allocated + args["Bytes"]
        points.append(((event["ts"] - starts[0]) / 1000, allocated / 2**20))
    return [(start - starts[0]) / 1000 for start in starts], points
