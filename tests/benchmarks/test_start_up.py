"""benchmarks/start_up.py: what it measures on programs whose times are known, and its table."""

from __future__ import annotations

import os
import sys
import time

import pytest

from benchmarks import start_up
from common.errors import SettingsError
from common.paths import PROJECT


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_measurement_ends_at_the_line_and_counts_the_cpu_of_the_whole_program():
    code = "import time; print('engine x', flush=True); time.sleep(0.4); sum(range(10**7))"
    start = time.perf_counter()
    measured = start_up.measure(python(code), "engine ", dict(os.environ))
    assert measured["seconds"] < time.perf_counter() - start - 0.4  # it sleeps after the line, on any machine
    assert measured["cpu_seconds"] > 0.02


@pytest.mark.parametrize("code", ["print('engine x'); raise SystemExit(3)", "print('no such line')"])
def test_a_command_that_fails_or_never_prints_the_line_is_an_error(code):
    with pytest.raises(SettingsError, match="failed"):
        start_up.measure(python(code), "engine ", dict(os.environ))


def test_the_table_has_the_ratio_to_the_baseline_of_the_same_round():
    ours = [{"seconds": 1.0, "cpu_seconds": 1.0}, {"seconds": 2.0, "cpu_seconds": 3.0}]
    theirs = [{"seconds": 2.0, "cpu_seconds": 2.0}, {"seconds": 2.0, "cpu_seconds": 2.0}]
    rows = start_up.table({"train.py --help": {"this": ours, "baseline": theirs}})
    assert rows[0][-1] == "CPU s / baseline" and rows[1][-1] == "1.00 (0.50 .. 1.50)"
    assert len(start_up.table({"train.py --help": {"this": ours}})[0]) == 3


def test_every_measured_script_exists(tmp_path):
    for command, _ in start_up.commands("this", PROJECT, tmp_path).values():
        script = next(word for word in command if word.endswith((".py", ".sh")))
        assert os.path.isfile(script), script
