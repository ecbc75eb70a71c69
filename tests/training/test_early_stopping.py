"""EMA in the run folder, and early stopping (--patience)."""

from __future__ import annotations

import json

import pytest
import torch
from programs import run
from safetensors.torch import load_file
from small_runs import STOPPED, results

from records.run_folder import RunFolder

# --- EMA ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged(training, runs) -> RunFolder:
    run("train.py", *training, "--name", "averaged", "--epochs", 4, "--hold-out", 0.2, "--set", "ema.decay=0.8")
    return RunFolder(runs / "averaged")


def evaluated(record: RunFolder, weights: str, split: str) -> dict:
    run("evaluate.py", record.folder, "--weights", weights, "--split", split, "--json", record.folder / "report.json")
    return json.loads((record.folder / "report.json").read_text())


def test_the_ema_is_evaluated_and_saved_and_the_trained_weights_are_saved_too(averaged):
    last = averaged.metrics()[-1]
    for file, name in (("weights.safetensors", "test"), ("raw_weights.safetensors", "test_raw")):
        report = evaluated(averaged, file, "test")
        assert report["correct"] == last[f"{name}_correct"] and report["loss"] == pytest.approx(
            last[f"{name}_loss"], abs=1e-5
        )
    average, raw = (load_file(averaged.folder / file) for file in ("weights.safetensors", "raw_weights.safetensors"))
    assert average.keys() == raw.keys() and not torch.equal(
        average["1.attention.part.qkv.weight"], raw["1.attention.part.qkv.weight"]
    )
    assert last["test_loss"] != last["test_raw_loss"]


def test_the_best_weights_are_chosen_by_the_accuracy_of_the_ema(averaged):
    lines = averaged.metrics()
    assert all({"validation_accuracy", "validation_raw_accuracy"} <= set(line) for line in lines)
    assert evaluated(averaged, "best.safetensors", "validation")["correct"] == max(
        line["validation_correct"] for line in lines
    )


def test_a_resumed_run_with_ema_equals_an_uninterrupted_one(averaged, training, runs):
    same = [
        "train.py",
        *training,
        "--name",
        "averaged-stopped",
        "--epochs",
        4,
        "--hold-out",
        0.2,
        "--set",
        "ema.decay=0.8",
    ]
    run(*same, "--stop-at", 5, code=STOPPED)
    run(*same)
    stopped = RunFolder(runs / "averaged-stopped")
    assert results(stopped) == results(averaged)
    for file in ("weights.safetensors", "raw_weights.safetensors", "best.safetensors"):
        assert (stopped.folder / file).read_bytes() == (averaged.folder / file).read_bytes()


# --- early stopping -----------------------------------------------------------------------------------------------

# A learning rate of 0: no epoch is better than the first.
STANDING_STILL = ["--hold-out", 0.2, "--epochs", 9, "--patience", 3, "--set", "optimizer.params.lr=0.0"]


def test_a_run_without_improvement_stops_early(training, runs):
    done = run("train.py", *training, "--name", "impatient", *STANDING_STILL)
    record = RunFolder(runs / "impatient")
    *early, last = record.metrics()
    assert last["epoch"] == 4 and last["ended_early"] is True and not any("ended_early" in line for line in early)
    assert "test_accuracy" in last and not any("test_accuracy" in line for line in early)  # looked at once, at the end
    assert (
        "early stopping: no better validation accuracy than" in done.out and "for 3 epochs (--patience 3)" in done.out
    )
    assert record.facts()["patience"] == 3
    again = run("train.py", *training, "--name", "impatient", *STANDING_STILL, code=2)
    assert "is finished; evaluate it" in again.err


def test_the_count_of_early_stopping_survives_a_stop(training, runs):
    """Epochs without improvement before the stop count."""
    same = ["train.py", *training, "--name", "impatient-stopped", *STANDING_STILL]
    run(*same, "--stop-at", 10, code=STOPPED)
    assert RunFolder(runs / "impatient-stopped").metrics()[-1]["epoch"] == 3
    run(*same)
    assert [line["epoch"] for line in RunFolder(runs / "impatient-stopped").metrics()] == [1, 2, 3, 4]


def test_patience_needs_a_validation_split(training):
    done = run("train.py", *training, "--name", "no-part", "--patience", 3, code=1)
    assert done.err.strip() == "error: --patience needs a validation split: add --hold-out 0.1"
