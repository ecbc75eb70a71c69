"""benchmarks/step_profile.py: the report has every finished turn, with the time of the host and of the device."""

from __future__ import annotations

import json
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import step_profile


class Work:
    """Stands for a Workload: remembers which contender trains each of its steps."""

    def __init__(self, *_):
        sizes = SimpleNamespace(total=8)
        self.engine = SimpleNamespace(device=torch.device("cpu"), batch_sizes=sizes, describe=lambda: "fp32")
        self.feed = SimpleNamespace(batches=SimpleNamespace(wait_seconds=0.0))

    def steps(self, count: int) -> None:
        used.append(chosen[-1])

    def close(self) -> None:
        pass


chosen: list[str] = []
used: list[str] = []


@pytest.fixture
def options(monkeypatch, tmp_path) -> Namespace:
    """Options of a measurement whose contenders are two names."""
    chosen.clear()
    used.clear()
    monkeypatch.setattr("benchmarks.lib.workload.Workload", Work)
    monkeypatch.setattr("benchmarks.lib.workload.Subject", lambda *_: None)
    monkeypatch.setattr("benchmarks.lib.memory_floor.copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(step_profile, "step_settings", lambda *_, **__: None)
    monkeypatch.setattr(step_profile, "memory_floor_bytes", lambda work: (None, "not counted"))
    monkeypatch.setattr(
        step_profile, "choices", lambda: {name: lambda name=name: chosen.append(name) for name in ("on", "off")}
    )
    sizes = {"steps": 1, "rounds": 3, "warm_up": 1, "profiled_steps": 1}
    return Namespace(preset="p", set=[], strategy="ddp", data_dir=tmp_path, source="auto", **sizes, json=tmp_path / "j")


def test_the_first_contender_is_in_the_report_before_the_second_compiles(options, monkeypatch):
    def limit_reached() -> None:
        raise TimeoutError

    contenders = {"on": lambda: chosen.append("on"), "off": limit_reached}
    monkeypatch.setattr(step_profile, "choices", lambda: contenders)
    with pytest.raises(TimeoutError):
        step_profile.measure(options, {})
    turns = json.loads(options.json.read_text())["turns"]
    assert list(turns) == ["on"] and len(turns["on"]["step_ms"]) == len(turns["on"]["host_ms"]) == 1


def test_contenders_take_turns_and_the_profile_is_of_the_first(options):
    report: dict = {}
    step_profile.measure(options, report)
    assert used[-1] == "on" and report["kinds_ms"] is not None and report["data_wait_ms"] == 0
    assert {len(found["step_ms"]) for found in report["turns"].values()} == {options.rounds}


def test_the_host_is_timed_without_waiting_for_the_device(monkeypatch):
    """A launch takes 1 ms, a step of the device 10 ms, and the queue holds the launches of two steps."""
    now = done = 0.0

    def steps(count: int) -> None:
        nonlocal now, done
        for _ in range(count):
            now = max(now + 1e-3, done - 2 * 10e-3)
            done = max(now, done) + 10e-3

    def synchronize(device) -> None:
        nonlocal now
        now = max(now, done)

    monkeypatch.setattr(step_profile, "synchronize", synchronize)
    monkeypatch.setattr(step_profile.time, "perf_counter", lambda: now)
    work, found = Work(), {"step_ms": [], "host_ms": [], "data_wait_ms": []}
    work.steps = steps
    step_profile.turn(work, lambda: None, 100, None, found)
    assert found["host_ms"] == [pytest.approx(1)] and found["step_ms"] == [pytest.approx(10, rel=0.02)]


def test_the_kernel_on_comes_first():
    assert next(iter(step_profile.choices())) == "kernel on"
