"""`--parallel auto`: the number of runs at once with the highest throughput of all together."""

from __future__ import annotations

import pytest
from comparisons import COMMON, VARIANTS, Invented

import compare
from comparison import parallel_trial

TOGETHER = {1: 500.0, 2: 800.0, 4: 700.0}  # images per second


@pytest.fixture
def machine(monkeypatch):
    """Four cores, no GPU, and runs whose speed depends on how many are started at once."""
    made = Invented()
    started: list[tuple[str, str]] = []

    def start(task, environment):
        started.append((task.name, environment["OMP_NUM_THREADS"]))
        count = int(task.name.split("-")[0]) if "at-once" in task.name else 1
        made.speed = dict.fromkeys((task.name.split("-")[-2], "once"), TOGETHER[count] / count)
        return made(task, environment)

    monkeypatch.setattr(compare, "launch", start)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    return started


def test_the_fastest_number_is_measured_once_and_used(ask, machine, tmp_path):
    code, out, err = ask(COMMON + VARIANTS, "--parallel", "auto")
    assert code == 0, out + err
    assert "parallel  2 at once has the highest throughput" in out
    trials = [name for name, _ in machine if "at-once" in name]
    assert len(trials) == 1 + 2 + 4
    assert {threads for name, threads in machine if name not in trials} == {"2"}  # 4 cores for 2 runs
    assert not (tmp_path / "runs" / "gates" / parallel_trial.TRIALS).exists()
    machine.clear()
    assert ask(COMMON + VARIANTS, "--parallel", "auto", "--seeds", "3")[0] == 0
    assert len(machine) == 2 and {threads for _, threads in machine} == {"2"}  # no second trial


def test_a_number_that_fails_ends_the_trial(ask, machine, monkeypatch):
    failing = Invented()
    failing.fails = {"4-at-once": "error: out of memory", "2-at-once": "error: out of memory"}
    monkeypatch.setattr(compare, "launch", failing)
    code, out, _ = ask(COMMON + VARIANTS, "--parallel", "auto")
    assert code == 0 and "parallel  1 at once" in out and not any("4-at-once" in name for name in failing.started)


def test_other_words_are_refused(ask, machine, capsys):
    with pytest.raises(SystemExit):
        ask(COMMON + VARIANTS, "--parallel", "many")
    assert "--parallel" in capsys.readouterr().err
