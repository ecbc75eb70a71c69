"""Progress of a comparison on the screen: a line per event, or a live table of variants x seeds on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import numpy as np

from common.errors import RunError
from common.text import duration
from comparison.planned_run import PlannedRun
from records.run_folder import RunFolder

TABLE_SECONDS = 2.0  # between two drawings of the table, for which metrics of running runs are read
MOST_COLUMNS = 12  # seeds with a column of their own; with more, the table counts runs


def progress_for(tasks: Sequence[PlannedRun], at_once: int) -> PlainProgress:
    """Return a live table if standard output is a terminal and rich is installed, else lines."""
    if sys.stdout.isatty():
        with suppress(ImportError):
            import rich  # noqa: F401

            return LiveTable(tasks, at_once)
    return PlainProgress(tasks, at_once)


class PlainProgress(AbstractContextManager):
    """One line per event: runs done, the event, and the ETA of the rest, which is known after the first run."""

    def __init__(self, tasks: Sequence[PlannedRun], at_once: int):
        self.tasks, self.at_once = tasks, at_once
        self.finished = {task.name for task in tasks if task.state() == "finished"}
        self.failed = {task.name for task in tasks if task.has_diverged()}
        self.running: dict[str, float] = {}  # name -> when it was started
        self.seconds: list[float] = []  # of the runs made so far
        if self.finished:
            self.say(f"{len(self.finished)} of {len(tasks)} runs are already finished")

    def __exit__(self, *_: Any) -> None:
        pass

    def started(self, task: PlannedRun) -> None:
        self.running[task.name] = time.monotonic()
        self._event(f"{task.name} started")

    def ended(self, task: PlannedRun, problem: str | None, is_stopping: bool) -> None:
        """Report the end of a run; `problem` is why it failed."""
        self.seconds.append(time.monotonic() - self.running.pop(task.name))
        (self.failed if problem else self.finished).add(task.name)
        if not is_stopping:
            outcome = f"FAILED: {problem}" if problem else "done"
            self._event(f"{task.name} {outcome} ({duration(self.seconds[-1])})")

    def tick(self) -> None:
        """Called several times a second."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def eta(self) -> str:
        """Return "; ETA 3 min", or nothing when no run is left."""
        waiting = len(self.tasks) - len(self.finished) - len(self.failed) - len(self.running)
        if not waiting and not self.running:
            return ""
        if not self.seconds:
            return "; ETA after the first run"
        mean = sum(self.seconds) / len(self.seconds)
        rest = sum(max(0.0, mean - (time.monotonic() - began)) for began in self.running.values())
        return f"; ETA {duration((waiting * mean + rest) / self.at_once)}"

    def _event(self, text: str) -> None:
        done = len(self.finished) + len(self.failed)
        self.say(f"[{done}/{len(self.tasks)}] {text}{self.eta()}")


class LiveTable(PlainProgress):
    """A table that is redrawn in place: accuracy on the validation split of every variant and seed so far."""

    def __init__(self, tasks: Sequence[PlannedRun], at_once: int):
        from rich.live import Live

        self.drawn = 0.0
        self.live = Live(auto_refresh=False)
        super().__init__(tasks, at_once)

    def __enter__(self) -> LiveTable:
        self.live.start()
        self.tick()
        return self

    def __exit__(self, *_: Any) -> None:
        self.drawn = 0.0
        self.tick()
        self.live.stop()

    def tick(self) -> None:
        if time.monotonic() - self.drawn >= TABLE_SECONDS:
            self.drawn = time.monotonic()
            self.live.update(self._table(), refresh=True)

    def say(self, text: str) -> None:
        self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _event(self, text: str) -> None:
        if "FAILED" in text:  # the table shows all other events
            super()._event(text)
        self.drawn = 0.0

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        done = len(self.finished) + len(self.failed)
        table = Table(caption=f"{done} of {len(self.tasks)} runs{self.eta()}", caption_justify="left")
        seeds = sorted({task.expected["seed"] for task in self.tasks})
        by_place = {(row_of(task), task.expected["seed"]): task for task in self.tasks}
        columns = [f"seed {seed}" for seed in seeds] if len(seeds) <= MOST_COLUMNS else ["done", "running", "waiting"]
        for name in ("variant", *columns, "mean ± sd"):
            table.add_column(name, justify="left" if name == "variant" else "right")
        for variant in dict.fromkeys(map(row_of, self.tasks)):
            tasks = [by_place[variant, seed] for seed in seeds if (variant, seed) in by_place]
            final = [value for task in tasks if task.name in self.finished and (value := accuracy(task)) is not None]
            if len(seeds) <= MOST_COLUMNS:
                cells = [self._cell(by_place.get((variant, seed))) for seed in seeds]
            else:
                ended = sum(task.name in self.finished | self.failed for task in tasks)
                running = sum(task.name in self.running for task in tasks)
                cells = [str(ended), str(running), str(len(tasks) - ended - running)]
            summary = f"{np.mean(final):.2f}" if final else ""
            summary += f" ± {np.std(final, ddof=1):.2f}" if len(final) > 1 else ""
            table.add_row(*(Text(text) for text in (variant, *cells, summary)))
        return table

    def _cell(self, task: PlannedRun | None) -> str:
        if task is None:
            return ""  # a run of another shard
        if task.name in self.failed:
            return "failed"
        if task.name in self.finished:
            value = accuracy(task)
            return "done" if value is None else f"{value:.2f}"
        if task.name in self.running:
            return f"{100 * share_done(task):.0f} % ..."
        return "-"


def row_of(task: PlannedRun) -> str:
    """Return the name of the row of a run."""
    return task.row or task.variant


def accuracy(task: PlannedRun) -> float | None:
    """Return the newest accuracy on the validation split, in points. The test split is not shown."""
    lines = _metrics(task)
    value = lines[-1].get("validation_accuracy") if lines else None
    return None if value is None else 100 * value


def share_done(task: PlannedRun) -> float:
    """Return the share of its steps that a run has recorded, from 0 to 1."""
    lines = _metrics(task)
    try:
        return lines[-1]["step"] / RunFolder(task.folder).facts()["total_steps"] if lines else 0.0
    except (RunError, KeyError, ZeroDivisionError):
        return 0.0


def _metrics(task: PlannedRun) -> list[dict[str, Any]]:
    with suppress(OSError, ValueError):  # written by another process at this moment
        return RunFolder(task.folder).metrics()
    return []
