"""`compare.py --parallel auto`: how many runs at once have the highest throughput together, measured by short runs.

Small networks do not fill a GPU, and on a CPU several runs with few threads each may be faster than one with all. So 1,
2 and 4 copies of one run train at once for a few steps, on each GPU or on all cores of the CPU. The number of the
highest sum of images per second is used for this comparison, and is kept in `parallel.json` in the folder of its runs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.files import write_atomically
from common.machine import cpu_name, visible_gpus
from common.stop_signal import StopRequest
from comparison.planned_run import PlannedRun
from comparison.run_queue import device_slots, run_all
from records.run_folder import RunFolder

COUNTS = (1, 2, 4)  # runs at once per GPU, or on the CPU
STEPS = 30  # of a trial; its first steps, which compile or warm up, are not timed
FEWEST_RUNS = 4  # of a comparison; with fewer, the trial takes longer than it saves
RESULT, TRIALS = "parallel.json", "parallel-trial"


def fastest_count(
    tasks: list[PlannedRun], stop: StopRequest, start: Callable[[PlannedRun, dict[str, str]], Any]
) -> int | None:
    """Return the number of concurrent runs of the highest throughput; None: the default, because nothing is known.

    Args:
        tasks: runs of the comparison; a copy of the first unfinished one is measured.
        start: as for `run_all`.
    """
    waiting = [task for task in tasks if task.is_left()]
    if not waiting:
        return None
    folder = waiting[0].folder.parent
    machine = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "gpus": visible_gpus()}
    throughput = _read(folder / RESULT, machine)
    if not throughput:
        if len(waiting) < FEWEST_RUNS:
            print(f"note: --parallel auto measures nothing for fewer than {FEWEST_RUNS} runs")
            return None
        throughput = _measure(waiting[0], folder / TRIALS, stop, start)
        if stop.number or not throughput:
            return None
        facts = {"machine": machine, "images_per_second": throughput, "run": waiting[0].name}
        write_atomically(folder / RESULT, json.dumps(facts, indent=2) + "\n")
    best = max(throughput, key=lambda count: throughput[count])
    listed = ", ".join(f"{count} at once {speed:,.0f}" for count, speed in throughput.items())
    print(f"parallel  {best} at once has the highest throughput (images/s of all together: {listed})", flush=True)
    return int(best)


def _read(path: Path, machine: dict[str, Any]) -> dict[str, float]:
    """Return the throughput that was measured on this machine, by number of runs; nothing where there is none."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return facts["images_per_second"] if facts["machine"] == machine else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _measure(
    task: PlannedRun, folder: Path, stop: StopRequest, start: Callable[[PlannedRun, dict[str, str]], Any]
) -> dict[str, float]:
    """Return images per second of all runs together, by the number of concurrent runs."""
    per_device = max(1, len(visible_gpus()))
    counts = [count for count in COUNTS if visible_gpus() or count <= len(os.sched_getaffinity(0))]
    throughput: dict[str, float] = {}
    for count in (count * per_device for count in counts):
        shutil.rmtree(folder, ignore_errors=True)
        copies = [_copy(task, folder / f"{count}-at-once-{i + 1}") for i in range(count)]
        failures = run_all(copies, device_slots(count), stop, start)
        if failures or stop.number:
            break  # such as out of memory: more at once would fail as well
        throughput[str(count)] = sum(RunFolder(copy.folder).metrics()[-1]["images_per_second"] for copy in copies)
    shutil.rmtree(folder, ignore_errors=True)
    return throughput


def _copy(task: PlannedRun, folder: Path) -> PlannedRun:
    """A short run of the same settings; of options that are given twice, train.py takes the last."""
    words = ["--name", folder.name, "--runs-dir", str(folder.parent), "--max-steps", str(STEPS)]
    return replace(
        task,
        name=folder.name,
        folder=folder,
        arguments=[*task.arguments, *words],
        expected={**task.expected, "max_steps": STEPS},
        variant="trial",
    )
