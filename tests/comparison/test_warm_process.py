"""Runs forked from one warm process have the bits of `python train.py`, and one that fails does not touch another.

All runs use dropout, augmentation, bf16 autocast and an EMA, and are evaluated within epochs.
"""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
from programs import run
from small_runs import results

from comparison import warm_process
from comparison.planned_run import PlannedRun
from comparison.warm_process import WarmProcesses, WarmRun
from records.run_folder import RunFolder

SLOT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SETTINGS = ["--set", "bf16.enabled=autocast", "--set", "ema.decay=0.8", "--set", "augmentation.crop_padding=2"]
SAME = [
    "--no-report",
    "--no-tensorboard",
    "--strategy",
    "ddp",
    "--epochs",
    3,
    "--hold-out",
    0.1,
    "--seed",
    5,
    "--evaluate-ema-only",
    *SETTINGS,
]
PARTS = ["--evaluate-every", "3steps", "--checkpoint-every", "epochs:2"]  # an epoch has 4 steps
FILES = ("weights.safetensors", "raw_weights.safetensors")


@pytest.fixture(scope="module")
def cold(training, runs) -> RunFolder:
    run("train.py", *training, "--name", "cold", *SAME, *PARTS)
    return RunFolder(runs / "cold")


@pytest.fixture(scope="module")
def warm(training, runs):
    """Return a function that starts a run in one warm process for this module."""
    patch = pytest.MonkeyPatch()
    patch.setattr(warm_process, "PACKAGES", ("torch", "torch._dynamo", "matplotlib.figure"))
    processes = WarmProcesses()

    def start(name: str, *words: object) -> WarmRun:
        arguments = [str(word) for word in (*training, "--name", name, *words)]
        return processes.start(PlannedRun(name, runs / name, arguments, {"settings": {"strategy": "ddp"}}), SLOT)

    yield start
    processes.close()
    patch.undo()


def end(child: WarmRun, code: int) -> RunFolder:
    deadline = time.monotonic() + 180
    while child.poll() is None:
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.01)
    assert child.poll() == code and child.cold is None, child.task.log.read_text()
    return RunFolder(child.task.folder)


def assert_same_bits(record: RunFolder, other: RunFolder, *files: str) -> None:
    for file in files:
        assert (record.folder / file).read_bytes() == (other.folder / file).read_bytes(), file


def test_the_first_run_has_the_weights_and_the_source_of_train_py(warm, cold):
    """It is evaluated at the end of each epoch, which changes nothing in the training."""
    first = end(warm("warm-1", *SAME), 0)
    assert_same_bits(first, cold, *FILES)
    assert [line["step"] for line in first.metrics()] == [4, 8, 12]
    last, other = results(first)[-1], results(cold)[-1]
    assert {key: last[key] for key in last if key != "train_loss"} == {
        key: other[key] for key in last if key != "train_loss"
    }
    # the program that starts the cold run in tests belongs to benchmarks/
    files = {path: digest for path, digest in cold.facts()["code"]["files"].items() if path[:11] != "benchmarks/"}
    assert first.facts()["code"]["files"] == files and "train.py" in files


def test_a_run_that_stops_and_resumes_next_to_failing_ones_has_the_same_bits_and_lines(warm, cold):
    """The second and the later runs of one warm process; a run that is stopped is one of them."""
    killed = warm("warm-killed", *SAME, "--epochs", 700)
    stopped = warm("warm-2", *SAME, *PARTS, "--stop-at", 7)
    while not killed.task.folder.exists():
        assert killed.poll() is None, killed.task.log.read_text()
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    wrong = warm("warm-wrong", *SAME, "--set", "model.feed_forward=glu2")
    end(killed, -signal.SIGKILL)
    assert "ended by SIGKILL; the system may have run out of memory" in killed.task.log.read_text()
    end(wrong, 1)
    assert "error: " in wrong.task.log.read_text()
    assert [line["step"] for line in end(stopped, 75).metrics()] == [3, 6]
    resumed = end(warm("warm-2", *SAME, *PARTS), 0)
    assert results(resumed) == results(cold)
    assert_same_bits(resumed, cold, *FILES, "best.safetensors")


def test_evaluations_within_epochs_have_lines_and_only_asked_checkpoints(cold):
    lines = cold.metrics()
    assert [(line["epoch"], line["step"], line.get("within_epoch", False)) for line in lines] == [
        (1, 3, True),
        (2, 6, True),
        (3, 9, True),
        (3, 12, False),
    ]
    assert [line.get("checkpoint", True) for line in lines] == [False, False, False, True]
    assert {path.name for path in (cold.folder / "state").iterdir()} == {"step-00000008", "step-00000012"}
    assert not any("raw_accuracy" in key for line in lines for key in line)  # --evaluate-ema-only
    assert cold.facts()["evaluate_every"] == "3steps"


def test_a_process_that_cannot_fork_starts_runs_cold_and_prints_why_once(tmp_path, monkeypatch, capsys):
    class Cold:
        def poll(self) -> int:
            return 0

    monkeypatch.setattr(warm_process, "SERVER", tmp_path / "fork_server.py")
    (tmp_path / "fork_server.py").write_text('print(\'{"refused": "it has threads"}\')')
    monkeypatch.setattr(warm_process, "launch_cold", lambda task, environment: Cold())
    processes = WarmProcesses()
    for name in ("a", "b"):
        child = processes.start(PlannedRun(name, tmp_path / name, [], {}), SLOT)
        while child.poll() is None:
            time.sleep(0.01)
        assert child.poll() == 0
    processes.close()
    assert capsys.readouterr().out == "note: each run starts its own Python process, because it has threads\n"


def test_all_servers_are_ended_the_retired_ones_too():
    closed = []
    processes = WarmProcesses()
    processes.servers = {"a": SimpleNamespace(close=lambda: closed.append("a"))}
    processes.retired = [SimpleNamespace(close=lambda: closed.append("b"))]
    processes.close()
    assert closed == ["a", "b"]


def test_runs_that_differ_in_their_gpu_alone_share_a_process(monkeypatch):
    started = []

    def server(packages, environment):
        started.append(environment)
        return SimpleNamespace(has_ended=lambda: False)

    monkeypatch.setattr(warm_process, "WarmProcess", server)
    monkeypatch.setattr(warm_process, "WarmRun", lambda processes, server, *rest: server)
    task, processes = SimpleNamespace(expected={"settings": {"strategy": "ddp"}}), WarmProcesses()
    environments = [{"A": "1", "CUDA_VISIBLE_DEVICES": "0"}, {"A": "1", "CUDA_VISIBLE_DEVICES": "1"}, {"A": "2"}]
    first, other_gpu, other_setting = (processes.start(task, environment) for environment in environments)
    assert first is other_gpu and first is not other_setting and len(started) == 2
