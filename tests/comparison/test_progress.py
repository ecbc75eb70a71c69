"""comparison/progress.py: lines for logs, and a table for terminals."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from comparisons import write_run

from common.stop_signal import StopSignal
from comparison import run_queue
from comparison.planned_run import PlannedRun
from comparison.progress import LiveTable, PlainProgress, progress_for
from comparison.run_queue import run_all
from config.settings import resolve


@pytest.fixture
def tasks(tmp_path):
    expected = {"settings": resolve("cpu", []).as_dict(), "max_steps": 6, "hold_out": 0.1, "fingerprint": "sha256:0"}
    return [
        PlannedRun(f"{variant}-seed{seed}", tmp_path / f"{variant}-seed{seed}", [], {**expected, "seed": seed}, variant)
        for variant in ("plain", "gated")
        for seed in (0, 1)
    ]


class Finishing:
    """A run that is finished at the second look."""

    def __init__(self, task, environment):
        self.task, self.looks, self.code = task, 0, None

    def poll(self):
        self.looks += 1
        if self.looks < 2 or self.code is not None:
            return self.code
        self.code = 0
        if self.task.name == "gated-seed1":
            self.task.log.write_text("error: no memory\n")
            self.code = 1
        else:
            write_run(self.task, 0.4 + self.task.expected["seed"] / 100, 1000.0, {})
        return self.code


def test_lines_have_counts_and_an_eta(tasks, capsys, signals):
    write_run(tasks[0], 0.5, 1000.0, {})
    assert list(run_all(tasks, [{}], StopSignal(), Finishing)) == ["gated-seed1"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 of 4 runs are already finished"
    assert lines[1] == "[1/4] plain-seed1 started; ETA after the first run"
    assert lines[2].startswith("[2/4] plain-seed1 done (") and re.search(r"; ETA \d s$", lines[2])
    assert lines[-1].startswith("[4/4] gated-seed1 FAILED: error: no memory (") and "ETA" not in lines[-1]


def test_a_terminal_gets_a_table_of_accuracies(tasks, monkeypatch, signals):
    pytest.importorskip("rich")
    from rich.console import Console

    screen = io.StringIO()
    tables = []

    def table(tasks, at_once):
        tables.append(LiveTable(tasks, at_once))
        tables[0].live.console = Console(file=screen, force_terminal=True, width=100)
        return tables[0]

    write_run(tasks[0], 0.5, 1000.0, {})
    monkeypatch.setattr(run_queue, "progress_for", table)
    assert list(run_all(tasks, [{}], StopSignal(), Finishing)) == ["gated-seed1"]
    text = screen.getvalue()
    assert "FAILED: error: no memory" in text and "4 of 4 runs" in text
    last = text[text.rindex("variant") :]
    assert "50.00" in last and "41.00" in last and "failed" in last and "45.50 ± 6.36" in last
    assert "12.35" not in text  # the accuracy on the test split


def test_without_a_terminal_there_is_no_table(tasks):
    assert type(progress_for(tasks, 1)) is PlainProgress


def test_an_edit_of_the_source_ends_a_comparison_and_names_every_run_that_is_left(tasks, capsys, monkeypatch):
    monkeypatch.setattr(run_queue.SourceWatch, "problem", lambda watch: "a.py changed" if watch.started else None)
    assert run_all(tasks, [{}], StopSignal(), Finishing) == {
        task.name: "a.py changed" for task in tasks if task.name != "plain-seed0"
    }
    assert "3 run(s) are not started: a.py changed" in capsys.readouterr().out


def test_after_a_stop_the_running_runs_are_told_once_and_no_other_starts(tasks, capsys, monkeypatch):
    monkeypatch.setattr(run_queue, "POLL_SECONDS", 0.001)
    stop, told, started = SimpleNamespace(number=0), [], []

    class Saving:
        """A run that ends some looks after it was told to."""

        def __init__(self, task, environment):
            self.name, self.looks = task.name, 0
            started.append(task.name)

        def terminate(self):
            told.append(self.name)

        def poll(self):
            self.looks += 1
            stop.number = 15 if self.looks == 3 else stop.number
            return 75 if self.looks > 9 else None

    assert run_all(tasks, [{}, {}], stop, Saving) == {}
    assert told == started == ["plain-seed0", "plain-seed1"]
    assert "stopping: 2 run(s) save first" in capsys.readouterr().out
