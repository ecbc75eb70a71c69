"""`--profile`: a trace, a table and a picture of the steps after the warmup; one run with `--log-gradients` too."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from programs import run

from common.files import read_lines
from records.run_data import RunData
from records.run_folder import RunFolder
from reports.gradients import gradients
from reports.page import write_page
from training.step_profile import WARM_UP_STEPS, StepProfile, read_memory
from training.trackers import StepLosses


def train_steps(profile: StepProfile, count: int) -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    for number in range(1, count + 1):
        with profile.step(number):
            (weight @ weight).relu().sum().backward()
    profile.finish()
    profile.close()


@pytest.mark.parametrize(("made", "recorded"), [(9, [6, 7]), (6, [6])], ids=["all", "the epoch ends before"])
def test_the_steps_after_the_warm_up_are_recorded(tmp_path, made, recorded):
    said = []
    profile = StepProfile(tmp_path, 2, first_steps=2, device=torch.device("cpu"), say=said.append)
    train_steps(profile, made)
    with gzip.open(tmp_path / "profile" / "trace.json.gz", "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert sorted(name for name in names if name.startswith("optimizer step")) == [
        f"optimizer step {number}" for number in recorded
    ]
    table = (tmp_path / "profile" / "operations.txt").read_text()
    head, _, *rows = table.splitlines()
    assert head.startswith(f"profile of {len(recorded)} step") and len(rows) == 10
    assert any(row.endswith("aten::mm") for row in rows) and "optimizer step" not in "".join(rows)
    shares = [float(row.split()[1].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.5
    starts, points = read_memory(tmp_path / "profile" / "trace.json.gz", on_gpu=False)
    assert len(starts) == len(recorded) and starts[0] == 0
    assert max(value for _, value in points) >= 64 * 64 * 4 / 2**20
    assert (tmp_path / "profile" / "memory.png").stat().st_size > 1000
    assert len(said) == 1 and table.strip() in said[0]
    assert profile.take_seconds() > 0 == profile.take_seconds()


def test_a_run_that_is_too_short_says_so(tmp_path):
    said = []
    train_steps(StepProfile(tmp_path, 2, 0, torch.device("cpu"), said.append), WARM_UP_STEPS)
    assert said == ["warning: --profile recorded nothing, because the run ended within its first steps; train longer"]
    assert not list(tmp_path.iterdir())


def test_without_the_flag_or_outside_the_main_process_nothing_happens(tmp_path):
    said = []
    train_steps(StepProfile(tmp_path, None, 0, torch.device("cpu"), said.append), 9)
    train_steps(StepProfile(None, 2, 0, torch.device("cpu"), said.append), 9)
    assert not said and not list(tmp_path.iterdir())


def test_a_run_with_profile_and_gradients(training, runs):
    said = run("train.py", *training, "--name", "watched", "--max-steps", 11, "--profile", 1, "--log-gradients").out
    record = RunFolder(runs / "watched")
    assert "profile of 1 step:" in said and "ui.perfetto.dev" in said
    lines = read_lines(record.folder / "steps.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 12))
    assert [line["step"] for line in lines if "gradient_norm" in line] == [5, 10, 11]
    keys = set(lines[4])
    assert {"gradient_norm/0_Embed", "update_ratio/2_Block", "gradient_norm/3_Head", "update_ratio"} <= keys
    figure = gradients(RunData.read(record.folder))
    assert [len(axes.lines) for axes in figure.axes] == [5, 5]
    assert not any("$" in label.get_text() for axes in figure.axes for label in axes.get_yticklabels(which="both"))
    page = write_page(RunData.read(record.folder)).read_text()
    assert "gradients and updates by layer" in page and "profile of 1 step" in page
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(record.folder / "tensorboard"))
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("gradients/update_ratio/1_Block")}
    assert shown == pytest.approx({line["step"]: line["update_ratio/1_Block"] for line in lines if keys <= set(line)})


def test_gradients_that_are_read_together_with_several_losses_keep_their_steps(tmp_path):
    tracker = StepLosses(tmp_path, step=0)
    for step in (10, 15):
        tracker.gradients(step, {"gradient_norm": float(step)})
    for step in (9, 10, 11, 15):
        tracker.loss(step, 1.0, 1)
    norms = {line["step"]: line.get("gradient_norm") for line in read_lines(tmp_path / "steps.jsonl")}
    assert norms == {9: None, 10: 10.0, 11: None, 15: 15.0}
