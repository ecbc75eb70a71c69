"""Runs of `train.py` through the local launcher: several at once where there are several GPUs, one failing run among them or not.

A run is known by its folder. One that is finished with the same settings is not run again, one that is unfinished goes on
from its checkpoint (that is `train.py`'s doing), and one of other settings is never touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import EXIT_STOPPED, RunError, SettingsError
from common.machine import visible_gpus
from common.paths import PROJECT
from common.stop_signal import StopSignal
from common.text import last_error
from config.differences import differences
from config.settings import Settings
from records.run_folder import RunFolder

LAUNCHER = PROJECT / "launch_local_train.sh"
LOOK_SECONDS = 0.2  # between looks at the children


@dataclass(frozen=True)
class PlannedRun:
    """One run to be made. `expected` are the facts that its run.json must hold to count as this run."""

    name: str
    folder: Path
    arguments: list[str]  # of train.py
    expected: dict[str, Any]

    def state(self) -> str:
        """ "new", "unfinished", "finished", or what differs between the run that is there and this one."""
        record = RunFolder(self.folder)
        if not record.exists:
            return "new"
        facts = record.facts()
        changed = [
            text for key, value in self.expected.items() for text in differences(_comparable(key, facts), value, key)
        ]
        if changed:
            return "; ".join(changed)
        return "finished" if record.is_finished() else "unfinished"

    @property
    def log(self) -> Path:
        """What the run said."""
        return self.folder.with_name(f"{self.folder.name}.log")


def _comparable(key: str, facts: dict[str, Any]) -> Any:
    if key == "fingerprint":
        return facts["dataset"]["fingerprint"]
    if key == "settings":  # a run made before a setting existed had that setting's default
        try:
            return Settings.from_dict(facts["settings"]).as_dict()
        except SettingsError:
            pass
    return facts[key]


def check_existing_runs(tasks: list[PlannedRun], redo: bool) -> None:
    """Make sure that every folder is free or holds this very run.

    Raises:
        RunError: one holds another run, and `redo` does not say to set it aside (it is renamed, not deleted).
    """
    for task in tasks:
        state = task.state()
        if state in ("new", "unfinished", "finished"):
            continue
        if not redo:
            raise RunError(
                f"{os.path.relpath(task.folder)} holds a run of other settings ({state}); give --redo-changed to set such runs "
                "aside and make them anew, or another --runs-dir"
            )
        RunFolder(task.folder).rename_aside()
        if task.log.exists():
            task.log.rename(task.log.with_name(f"{task.log.name}.old"))


def device_slots(parallel: int | None) -> list[dict[str, str]]:
    """What to add to the environment of the first, second ... of the runs that go on at once; its length is how many do."""
    gpus = visible_gpus()
    count = parallel or max(1, len(gpus))
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(count)]
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    return [
        {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        for _ in range(count)
    ]


def launch(task: PlannedRun, environment: dict[str, str]) -> subprocess.Popen:
    """Start a run, in a session of its own: a Ctrl-C in the terminal is for us, and we tell the children once."""
    command = [str(LAUNCHER), *task.arguments]
    if shutil.which("setpriv"):  # should we be killed, the kernel tells the launcher, which lets the run save
        command = ["setpriv", "--pdeathsig", "TERM", *command]
    with task.log.open("w") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "NUM_PROCS": "1", "PYTHON": sys.executable, **environment},
        )


def run_all(
    tasks: list[PlannedRun],
    environments: list[dict[str, str]],
    stop: StopSignal,
    start: Callable[[PlannedRun, dict[str, str]], Any],
) -> dict[str, str]:
    """Make every run that is not finished, in the order given; `start` is `launch`, or gives another thing with poll and terminate.

    Returns the runs that failed, by name, each with the last error it printed. When `stop` is asked for, the children are told
    to save, waited for, and what is left is not started.
    """
    failures: dict[str, str] = {}
    waiting = [task for task in tasks if task.state() != "finished"]
    done = len(tasks) - len(waiting)
    if done:
        _say(f"{done} of {len(tasks)} runs are finished already")
    running: dict[int, tuple[PlannedRun, Any, float]] = {}  # by slot
    spent: list[float] = []
    told = False
    try:
        while running or (waiting and not stop.number):
            for slot, (task, child, began) in list(running.items()):
                if child.poll() is not None:
                    del running[slot]
                    if problem := _problem(task, child.poll(), bool(stop.number)):
                        failures[task.name] = problem
                    done, spent = done + 1, [*spent, time.monotonic() - began]
                    if not stop.number:
                        _say(
                            _line(
                                done,
                                len(tasks),
                                f"{task.name} {'FAILED: ' + problem if problem else 'done'} ({spent[-1]:.0f} s)",
                                running,
                                waiting,
                                spent,
                                len(environments),
                            )
                        )
            for slot in range(len(environments)):
                if slot not in running and waiting and not stop.number:
                    task = waiting.pop(0)
                    task.folder.parent.mkdir(parents=True, exist_ok=True)
                    running[slot] = (task, start(task, environments[slot]), time.monotonic())
                    _say(_line(done, len(tasks), f"{task.name} started", running, waiting, spent, len(environments)))
            if stop.number and not told:
                told = True
                _say(f"stopping: {len(running)} run(s) save first (a second Ctrl-C does not wait)")
                for _, child, _ in running.values():
                    child.terminate()
            time.sleep(LOOK_SECONDS)
    except BaseException:
        for _, child, _ in running.values():
            child.terminate()
        raise
    return failures


def _say(text: str) -> None:
    print(text, flush=True)


def _line(
    done: int,
    total: int,
    what: str,
    running: dict[int, Any],
    waiting: list[PlannedRun],
    spent: list[float],
    at_once: int,
) -> str:
    """A line of progress: how many are done, what has just happened, and about how long the rest takes."""
    if not running and not waiting:
        return f"[{done}/{total}] {what}"
    if not spent:
        return f"[{done}/{total}] {what}; time left: known after the first run"
    mean = sum(spent) / len(spent)
    under_way = sum(max(0.0, mean - (time.monotonic() - began)) for _, _, began in running.values())
    left = (len(waiting) * mean + under_way) / at_once
    return (
        f"[{done}/{total}] {what}; about {left / 60:.0f} min left"
        if left >= 90
        else f"[{done}/{total}] {what}; about {left:.0f} s left"
    )


def _problem(task: PlannedRun, code: int, stopping: bool) -> str | None:
    """Why a run that ended has not finished; None where it has, or was told to stop."""
    if stopping or (code == 0 and task.state() == "finished"):
        return None
    if code == EXIT_STOPPED:
        return "was stopped from outside, and saved; start the same comparison again to go on"
    return (
        last_error(task.log.read_text(errors="replace") if task.log.exists() else "")
        or f"ended with exit code {code} and said nothing"
    )
