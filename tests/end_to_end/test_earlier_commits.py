"""Files of commit 5db9433 are read, resumed to the same bits and evaluated: dataset, runs, checkpoint, experiment.

tests/fixtures/made_by_5db9433.zip holds: `dataset` (three classes of generated images of 8 x 8 pixels, prepared),
`runs/stopped` (stopped after step 5 of 8), `runs/finished` (the same run, uninterrupted) and `comparison` (two
variants, two seeds, and their report).
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import programs
import pytest
import torch
from safetensors.torch import load_file

from common.paths import PROJECT
from image_data.dataset import Dataset
from records.run_folder import RunFolder


@pytest.fixture
def left(tmp_path) -> Path:
    """The fixture, unpacked."""
    with zipfile.ZipFile(PROJECT / "tests" / "fixtures" / "made_by_5db9433.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


def resume(left: Path, *more: object) -> None:
    programs.run(
        "train.py",
        "--preset",
        left / "comparison" / "tiny.toml",
        "--data-dir",
        left / "dataset",
        "--runs-dir",
        left / "runs",
        "--name",
        "stopped",
        "--seed",
        3,
        "--hold-out",
        0.2,
        "--no-tensorboard",
        *more,
    )


def test_a_prepared_dataset_is_read(left):
    dataset = Dataset.open(left / "dataset")
    assert dataset.classes == ["circle", "cross", "two words"] and dataset.image_side == 8
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 18, "test": 9}
    assert dataset.splits["train"].pixels().shape == (18, 8, 8, 3)


@pytest.mark.parametrize("strategy", ["zero", "ddp"])
def test_a_stopped_run_is_resumed_to_the_same_weights(left, strategy):
    resume(left, "--strategy", strategy)
    ours, theirs = (load_file(left / "runs" / name / "weights.safetensors") for name in ("stopped", "finished"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=2e-6)
    resumed, unbroken = RunFolder(left / "runs/stopped").metrics(), RunFolder(left / "runs/finished").metrics()
    assert [line["step"] for line in resumed] == [line["step"] for line in unbroken]
    assert [line["train_loss"] for line in resumed] == pytest.approx(
        [line["train_loss"] for line in unbroken], abs=1e-6
    )
    assert resumed[-1]["test_correct"] == unbroken[-1]["test_correct"]


def test_a_finished_run_is_evaluated(left):
    programs.run("evaluate.py", left / "runs/finished", "--data-dir", left / "dataset", "--json", left / "report.json")
    report, last = json.loads((left / "report.json").read_text()), RunFolder(left / "runs/finished").metrics()[-1]
    assert (report["correct"], report["seen"]) == (last["test_correct"], last["test_seen"])
    assert report["loss"] == pytest.approx(last["test_loss"], rel=1e-5)


def test_a_comparison_is_reported_from_its_finished_runs(left):
    arguments = [
        left / "comparison/two-arms.toml",
        "--data-dir",
        left / "dataset",
        "--runs-dir",
        left / "comparison/runs",
        "--results-dir",
        left / "results",
        "--report-only",
    ]
    programs.run("compare.py", *arguments)
    ours = json.loads((left / "results/two-arms-small/report.json").read_text())
    theirs = json.loads((left / "comparison/report.json").read_text())
    ours, theirs = (report["results"]["validation"] for report in (ours, theirs))
    assert [row["by_seed"] for row in ours] == [row["by_seed"] for row in theirs]
    assert [row["mean"] for row in ours] == [row["mean"] for row in theirs] and len(ours) == 2
