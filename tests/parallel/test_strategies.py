"""Every strategy from end to end: training on two processes, evaluation, and resuming.

Runs also resume under another strategy and on another number of processes.
"""

from __future__ import annotations

import json

import programs
import pytest
from safetensors.torch import load_file
from small_runs import TEST_PER_CLASS

from parallel.strategies import STRATEGIES
from records.run_folder import RunFolder


def start(training: list, processes: int, name: str, strategy: str, *arguments: str, code: int = 0) -> str:
    """Run train.py with a number of processes; return the output of the first one."""
    words = ["train.py", *map(str, training), "--name", name, "--strategy", strategy, "--max-steps", "6", *arguments]
    if strategy == "local":
        words += ["--set", "parallel.local_steps=3"]
    return programs.run_ranks(processes, *words, code=code)[0].out


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in ("zero", "dp")])  # zero: test_train.py
def test_two_processes_train_and_evaluate_agrees(training, runs, strategy):
    start(training, 2, strategy, strategy)
    record = RunFolder(runs / strategy)
    lines = record.metrics()
    assert [line["step"] for line in lines] == [4, 6] and lines[-1]["test_seen"] == 10 * TEST_PER_CLASS
    done = programs.run("evaluate.py", record.folder, "--json", record.folder / "report.json")
    assert f"({lines[-1]['test_correct']}/{lines[-1]['test_seen']})" in done.out
    assert json.loads((record.folder / "report.json").read_text())["loss"] == pytest.approx(
        lines[-1]["test_loss"], abs=1e-5
    )
    apart = [line.get("worker_distance") for line in lines]
    if strategy in ("gossip", "local"):
        # two workers make one pair, equal after every step; the others are apart until the sixth step ends with an
        # outer one
        assert (apart[0] > 0) == (strategy == "local") and apart[1] == 0
    else:
        assert apart == [None, None]


@pytest.mark.parametrize("strategy", ["local", "pipeline"])
def test_two_stopped_processes_resume_with_the_same_bits(training, runs, strategy):
    """With dropout, within an epoch and between two outer steps; after the test above, whose run was not stopped."""
    unbroken = RunFolder(runs / strategy)
    if not unbroken.exists:
        start(training, 2, strategy, strategy)
    start(training, 2, f"{strategy}-stopped", strategy, "--stop-at", "2", code=75)
    start(training, 2, f"{strategy}-stopped", strategy)
    stopped = RunFolder(runs / f"{strategy}-stopped")
    assert (stopped.folder / "weights.safetensors").read_bytes() == (
        unbroken.folder / "weights.safetensors"
    ).read_bytes()
    assert [line["test_loss"] for line in stopped.metrics()] == [line["test_loss"] for line in unbroken.metrics()]


FIXED = ["--set", "model.dropout=0.0", "--set", "ema.decay=0.5"]  # dropout differs from process to process
# (processes, strategy, settings) that a run is stopped under after three of six steps, and those it goes on under.
MOVES = [
    ((2, "zero", ["--set", "zero_optimization.stage=2"]), (1, "ddp", [])),
    ((2, "fsdp", []), (2, "zero", ["--set", "zero_optimization.stage=3"])),
    ((1, "zero", ["--set", "zero_optimization.stage=3"]), (2, "pipeline", [])),
]


@pytest.fixture(scope="module")
def never_moved(training, runs) -> dict:
    start(training, 1, "never-moved", "ddp", *FIXED)
    return {file: load_file(runs / "never-moved" / file) for file in ("weights.safetensors", "raw_weights.safetensors")}


@pytest.mark.parametrize(("before", "after"), MOVES, ids=lambda side: f"{side[1]} {side[2][1:]} on {side[0]}")
def test_a_run_resumes_under_another_strategy_and_ends_with_the_same_weights(
    training, runs, never_moved, before, after
):
    name = f"{before[1]}-to-{after[1]}"
    start(training, *before[:1], name, before[1], *before[2], *FIXED, "--stop-at", "3", code=75)
    assert "resuming  after step 3 of 6" in start(training, *after[:1], name, after[1], *after[2], *FIXED)
    for file, expected in never_moved.items():
        found = load_file(runs / name / file)
        assert found.keys() == expected.keys()
        # Adam turns the rounding of very small gradients into steps of a size; without a moment or the average it would
        # be 1e-3.
        assert max((found[key] - expected[key]).abs().max().item() for key in found) < 5e-5, file


def test_dp_on_a_machine_without_gpus_says_so_in_one_sentence(training):
    done = programs.run("train.py", *training, "--strategy", "dp", code=1)
    assert done.err.count("\n") == 1 and "there are 0 here" in done.err
