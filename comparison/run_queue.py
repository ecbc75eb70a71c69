"""Runs of `train.py` through the local launcher: one per GPU at a time, and a failing run does not end the others.

A run is identified by its folder. A finished run with the same settings is reused, `train.py` resumes an unfinished one
from its checkpoint, and a run of other settings is never touched. All runs of one variant have the same source code.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from common.errors import EXIT_STOPPED, RunError, SettingsError
from common.machine import visible_gpus
from common.paths import PROJECT, near_path
from common.stop_signal import StopRequest
from common.text import last_error, listed
from comparison.planned_run import PlannedRun
from comparison.progress import progress_for
from records.provenance import changed_between, changed_since
from records.run_folder import RunFolder

LAUNCHER = PROJECT / "launch_local_train.sh"
POLL_SECONDS = 0.2  # between checks of the child processes


def check_existing_runs(tasks: list[PlannedRun], redo: bool) -> None:
    """Make sure that every folder is free or holds this very run, and that no variant mixes two sources.

    Args:
        redo: rename runs of other settings or another source aside, so that they are run again. Nothing is deleted.

    Raises:
        RunError: without `redo`, a folder holds a run of other settings, or the source has changed since a run of a
            variant that has runs left; the message names the files.
    """
    for task in tasks:
        state = task.state()
        if state in ("new", "unfinished", "finished"):
            continue
        if not redo:
            raise RunError(
                f"{near_path(task.folder)} holds a run of other settings ({state}); add --redo-changed to rename "
                "such runs aside and run them again, or use another --runs-dir"
            )
        _rename_aside(task)
    for variant in dict.fromkeys(task.variant or task.name for task in tasks):
        _check_source([task for task in tasks if (task.variant or task.name) == variant], variant, redo)


def _check_source(tasks: list[PlannedRun], variant: str, redo: bool) -> None:
    """Compare the source of the existing runs of one variant with the files on disk, which the other runs will use."""
    states = {task.name: task.state() for task in tasks}
    existing = {task.name: RunFolder(task.folder).facts().get("code") for task in tasks if states[task.name] != "new"}
    changed = {name: changed_since(code) if code else [] for name, code in existing.items()}
    is_complete = not any(task.is_left() for task in tasks)
    is_complete = is_complete and not mixed_sources(existing)
    if redo:
        for task in tasks:
            if changed.get(task.name) or (task.name in existing and not existing[task.name] and not is_complete):
                _rename_aside(task)
        return
    if is_complete:
        return  # nothing is left to run: a later edit does not spoil what is finished
    for name, code in existing.items():
        if not code or changed[name]:
            what = (
                f"{listed(changed[name])} changed after {name} was started"
                if code
                else f"{name} does not record its source (an earlier version of this project)"
            )
            raise RunError(
                f"variant '{variant}' would mix two versions of the source code: {what}. Undo the change, or add "
                "--redo-changed to rename such runs aside and run them again"
            )


def mixed_sources(codes: dict[str, dict[str, Any] | None]) -> str | None:
    """Return how the sources of several runs differ, None where they do not.

    Args:
        codes: run name -> `code` of its run.json, None for a run that does not record it.
    """
    first, of_first = next(iter(codes.items()), ("", None))
    for name, code in codes.items():
        if (code is None) != (of_first is None):
            return f"only one of {first} and {name} records its source"
        if code and of_first and (files := changed_between(of_first, code)):
            return f"{first} and {name} differ in {listed(files)}"
    return None


def _rename_aside(task: PlannedRun) -> None:
    aside = RunFolder(task.folder).rename_aside()
    if task.log.exists():
        task.log.rename(aside.with_name(f"{aside.name}.log"))


def device_slots(parallel: int | None) -> list[dict[str, str]]:
    """Return what each of the concurrent runs adds to its environment, one dictionary per concurrent run."""
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
    """Start a run in its own session, so that Ctrl-C reaches this process alone, which signals the runs once."""
    command = [str(LAUNCHER), *task.arguments]
    if shutil.which("setpriv"):  # if this process is killed, the kernel signals the launcher, and the run saves
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
    stop: StopRequest,
    start: Callable[[PlannedRun, dict[str, str]], Any],
    set_active: Callable[[int], None] = lambda count: None,
) -> dict[str, str]:
    """Run what is not finished, as many at once as there are environments, and print progress.

    A run that has diverged is not repeated, since it would diverge again: its error is its failure.
    When `stop` is requested, the running ones are told to save and are waited for; the others are not started.

    Args:
        start: starts a run; its result has `poll()` and `terminate()` as subprocess.Popen.
        set_active: is told several times a second, and at the end, how many runs are active.

    Returns:
        Run name -> reason, for runs that failed.
    """
    failures = {task.name: error for task in tasks if (error := task.divergence())}
    source = SourceWatch()
    waiting = [task for task in tasks if task.is_left()]
    running: dict[int, tuple[PlannedRun, Any]] = {}  # by slot
    is_stopping = False
    with progress_for(tasks, len(environments)) as progress:
        try:
            while running or (waiting and not stop.number):
                for slot, (task, child) in list(running.items()):
                    if child.poll() is None:
                        continue
                    del running[slot]
                    problem = _problem(task, child.poll(), bool(stop.number))
                    if problem:
                        failures[task.name] = problem
                    progress.ended(task, problem, bool(stop.number))
                for slot in range(len(environments)):
                    if slot not in running and waiting and not stop.number:
                        if problem := source.problem() or _changed_settings(waiting[0]):
                            failures |= dict.fromkeys([task.name for task in waiting], problem)
                            progress.say(f"{len(waiting)} run(s) are not started: {problem}")
                            waiting.clear()
                            break
                        task = waiting.pop(0)
                        source.started.append(task)
                        task.folder.parent.mkdir(parents=True, exist_ok=True)
                        running[slot] = (task, start(task, environments[slot]))
                        progress.started(task)
                if stop.number and not is_stopping:
                    is_stopping = True
                    progress.say(f"stopping: {len(running)} run(s) save first (a second Ctrl-C does not wait)")
                    for _, child in running.values():
                        child.terminate()
                set_active(len(running))
                progress.tick()
                time.sleep(POLL_SECONDS)
        except BaseException:
            for _, child in running.values():
                child.terminate()
            raise
    return failures


class SourceWatch:
    """Notices an edit of the source code while a comparison is running, which would mix two versions of it."""

    def __init__(self) -> None:
        self.started: list[PlannedRun] = []
        self._files: dict[str, str] = {}  # path -> digest, of all files that a started run has imported
        self._first: dict[str, str] = {}  # path -> the run that imported it first

    def problem(self) -> str | None:
        """Return why no further run may start; None as long as every imported file is the same on the disk."""
        for task in list(self.started):
            record = RunFolder(task.folder)
            if record.exists:  # written early, when the run has imported its files
                self.started.remove(task)
                for path, digest in (record.facts().get("code") or {}).get("files", {}).items():
                    self._files.setdefault(path, digest)
                    self._first.setdefault(path, task.name)
        changed = changed_since({"files": self._files})
        if not changed:
            return None
        return (
            f"{listed(changed)} changed after {self._first[changed[0]]} was started, and a comparison has one version "
            "of the source code. Undo the change and start the same command again, or add --redo-changed to rename the "
            "runs of the former version aside and run them again"
        )


def _changed_settings(task: PlannedRun) -> str | None:
    """Return why a run may not start: a preset or `ds_config.json` was edited; None where the settings are the same."""
    try:
        changed = task.changed_settings()
    except SettingsError as error:
        changed = [str(error)]
    if not changed:
        return None
    return (
        f"the preset or ds_config.json was edited after this command started ({'; '.join(changed)}). Undo this and "
        "start the same command again, or add --redo-changed to rename the runs of the former settings aside"
    )


def _problem(task: PlannedRun, code: int, stopping: bool) -> str | None:
    """Why a run that ended has not finished; None if it has finished, or was told to stop."""
    state = task.state()
    if stopping or (code == 0 and state == "finished"):
        return None
    if code == 0 and state not in ("new", "unfinished"):
        return f"trained with other settings than planned ({state}), because a file was edited meanwhile"
    if code == EXIT_STOPPED:
        return "was stopped by a signal, and saved; start the same command again to resume"
    return (
        last_error(task.log.read_text(errors="replace") if task.log.exists() else "")
        or f"ended with exit code {code} and no output"
    )
