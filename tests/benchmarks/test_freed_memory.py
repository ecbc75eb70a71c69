"""benchmarks/freed_memory.py: a turn trains in a process of its own, and the ratio is taken round by round."""

from __future__ import annotations

import json
from argparse import Namespace

import programs
import pytest

from benchmarks import freed_memory
from benchmarks.freed_memory import BASELINE, OURS, rows, turn
from common.errors import RunError


def facts(speed: float) -> dict[str, float]:
    return {
        "images_per_second": speed,
        "page_faults_per_step": 4e3,
        "kernel_seconds_per_step": 0.002,
        "peak_memory_mib": 900,
    }


def test_the_ratio_is_that_of_turns_of_one_round():
    turns = {BASELINE: [facts(speed) for speed in (100, 200, 400)], OURS: [facts(speed) for speed in (110, 240, 360)]}
    header, base, ours = rows({"turns": turns})
    assert header[2] == "ratio" and base[2] == "1.00" and ours[2].startswith("1.10 (0.90 .. 1.20)")
    assert ours[0] == OURS and ours[3:] == ["4,000", "2.0", "900"]


def test_a_process_trains_and_prints_its_measurements(tiny):
    words = ["--worker", "--preset", tiny, "--steps", 2, "--warm-up", 1, "--set", "train_batch_size=8"]
    done = programs.run("benchmarks/freed_memory.py", *words)
    found = json.loads(done.out.splitlines()[-1])
    assert found.keys() == facts(1).keys() and found["images_per_second"] > 0


def test_a_process_that_fails_or_hangs_is_named(monkeypatch):
    options = Namespace(preset="cpu-quick", set=["model.width=-1"], steps=1, warm_up=1, threads=1)
    with pytest.raises(RunError, match="the process with memory kept failed: error: .*width"):
        turn(OURS, options)
    monkeypatch.setattr(freed_memory, "LIMIT_SECONDS", 0.01)
    with pytest.raises(RunError, match=r"kept was still running after 0\.01 s"):
        turn(OURS, options)
