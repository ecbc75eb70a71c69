"""comparison/time_budget.py: a budget in seconds becomes steps of each variant."""

from __future__ import annotations

import pytest
from comparisons import COMMON, VARIANTS, report

import compare
from comparison.time_budget import COMPILING, steps_for
from parallel.compile import CPU_IMAGES, FIRST_STEPS
from records.run_folder import RunFolder


def test_a_budget_in_seconds_becomes_steps_for_each_variant(ask, invented, tmp_path):
    assert steps_for(60, (20, 3.0), (120, 8.0)) == round((60 - 2) / 0.05)  # 2 s to start, then 0.05 s a step
    invented.speed = {"gated": 500.0, "plain": 2000.0}
    text = COMMON.replace("steps = 6", "seconds = 60") + VARIANTS
    assert "the speed of each variant is measured first" in ask(text, "--dry-run")[1] and not invented.started
    assert ask(text)[0] == 0
    steps = {
        name: RunFolder(tmp_path / "runs" / "gates" / f"{name}-seed1").facts()["max_steps"]
        for name in ("plain", "gated")
    }
    assert steps == {"plain": round(59.5 * 2000 / 64), "gated": round(59.5 * 500 / 64)}
    text, data = report(tmp_path)
    assert all(variant["unequal"] == [] for variant in data["arms"].values()) and "60 seconds" in text
    assert ask(COMMON.replace("steps = 6", "seconds = 60") + VARIANTS, "--report-only")[0] == 0


@pytest.mark.parametrize("has_compiler", [True, False])
def test_a_budget_in_seconds_is_measured_compiled_where_long_runs_are_compiled(
    ask, invented, monkeypatch, tmp_path, has_compiler
):
    """In bf16 on a CPU, 60 s at 4,000 images/s are more than CPU_IMAGES, at 2,000 they are less."""

    def start(task, environment):
        is_compiled = task.expected["settings"]["compile"] == "on"
        if is_compiled and not has_compiler:
            invented.fails[task.name] = "error: compile=on: torch.compile does not work on this machine"
        invented.facts[task.name] = {"precision": "bf16"}
        invented.speed = {"gated": 2000.0, "plain": 4000.0}
        if task.name == "calibration-plain-compiled":
            invented.speed = {"plain": 8000.0}
        return invented(task, environment)

    monkeypatch.setattr(compare, "launch", start)
    assert COMPILING[0] == FIRST_STEPS["on"] and 60 * 2000 < CPU_IMAGES < 59 * 4000
    text = COMMON.replace("steps = 6", "seconds = 60") + VARIANTS
    assert ask(text)[0] == 0
    measured = {name for name in invented.started if "calibration" in name and "short" not in name}
    assert measured == {"calibration-gated-long", "calibration-plain-long", "calibration-plain-compiled"}
    steps = RunFolder(tmp_path / "runs" / "gates" / "plain-seed0").facts()["max_steps"]
    assert (steps > 1.2 * 60 * 4000 / 64) is has_compiler
    invented.started.clear()
    assert ask(text)[0] == 0 and not invented.started


def test_a_budget_in_seconds_is_refused_where_runs_share_a_device(ask, invented, monkeypatch):
    text = COMMON.replace("steps = 6", "seconds = 60") + VARIANTS
    for parallel in ("auto", "2"):
        code, _, err = ask(text, "--parallel", parallel)
        assert code == 1 and not invented.started and "leave out --parallel" in err
    assert ask(text, "--parallel", "1", "--dry-run")[0] == 0
    monkeypatch.setattr(compare, "visible_gpus", lambda: ["0", "1"])
    assert ask(text, "--parallel", "2", "--dry-run")[0] == 0
    assert ask(text, "--parallel", "3", "--dry-run")[0] == 1


def test_a_budget_in_seconds_that_was_missed_is_named(ask, invented, monkeypatch, tmp_path):
    def slower(task, environment):
        if task.name.startswith("gated-seed"):
            invented.speed["gated"] = 700.0
        return invented(task, environment)

    monkeypatch.setattr(compare, "launch", slower)
    assert ask(COMMON.replace("steps = 6", "seconds = 60") + VARIANTS)[0] == 0
    assert report(tmp_path)[1]["arms"]["gated"]["unequal"] == ["training seconds: 86 on average instead of 60"]
