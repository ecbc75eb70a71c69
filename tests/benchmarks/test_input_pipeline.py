"""benchmarks/input_pipeline.py: every loader does the same work and is measured in the same way. No speeds here.

pytest tests/benchmarks/test_input_pipeline.py
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from benchmarks import input_pipeline
from benchmarks.lib import noise_dataset
from benchmarks.lib.check import Check
from benchmarks.lib.gpu_check_parts import input_figures
from benchmarks.lib.loader_tasks import BASELINES, JOBS, OPTIONAL, OURS, Task
from benchmarks.lib.loaders import loaders
from benchmarks.lib.timing import Window, alternate, ratios, spread
from image_data.dataset import Dataset
from image_data.preparation.prepare import prepare

PROGRAM = Path(input_pipeline.__file__)
ROUNDS, BATCH, IMAGES = 1, 16, 100  # six full batches per epoch, four images dropped


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "shapes"
    prepare(folder, dataset="shapes", workers=1, shapes={"side": 32, "train_per_class": 12, "test_per_class": 1})
    return folder


@pytest.fixture(scope="module")
def measured(drawn) -> tuple[dict, str, str]:
    """The JSON, the Markdown and the printed text of one small run of everything."""
    files = drawn / "report.json", drawn / "report.md"
    command = [
        sys.executable,
        PROGRAM,
        "--data-dir",
        drawn,
        "--batch-size",
        BATCH,
        "--images",
        IMAGES,
        "--rounds",
        ROUNDS,
        "--threads",
        1,  # each one is a process of every baseline, which imports torchvision
        "--turn-seconds",
        0.01,
        "--device",
        "cpu",
        "--json",
        files[0],
        "--markdown",
        files[1],
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=250, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(files[0].read_text()), files[1].read_text(), done.stdout


def test_the_names_on_the_command_line_are_those_of_the_loaders():
    assert list(loaders()) == [*OURS, *BASELINES, *OPTIONAL]


def test_every_loader_yields_as_many_images(measured):
    report, _, _ = measured
    counts = {
        (job, loader): facts["images_per_epoch"]
        for job, part in report["jobs"].items()
        for loader, facts in part["loaders"].items()
    }
    assert set(counts.values()) == {IMAGES // BATCH * BATCH} == {report["settings"]["images_per_epoch"]}


def test_every_loader_ran_or_reports_the_reason(measured):
    report, _, _ = measured
    assert list(report["jobs"]) == list(JOBS)
    for job, part in report["jobs"].items():
        assert {*part["loaders"], *part["skipped"]} == {*OURS, *BASELINES}
        assert {*OURS, "imagefolder", "memory"} <= set(part["loaders"])
        assert all(part["skipped"].values())
        assert ("whole_batch" in part["loaders"]) == (job == "crop")
    assert report["jobs"]["crop"]["unlike"] == []


def test_the_report_has_every_round_and_ratio(measured):
    report, _, _ = measured
    for part in report["jobs"].values():
        for facts in part["loaders"].values():
            assert facts["epochs_per_turn"] >= 1
            for figure in ("images_per_second", "cpu_us_per_image"):
                assert len(facts[figure]) == ROUNDS and min(facts[figure]) >= 0
        assert list(part["ratios"]) == [name for name in OURS if name in part["loaders"]]
        for ours, others in part["ratios"].items():
            assert list(others) == [name for name in BASELINES if name in part["loaders"]]
            for other, values in others.items():
                speeds = [part["loaders"][name]["images_per_second"] for name in (ours, other)]
                assert values == [a / b for a, b in zip(*speeds, strict=True)]
    assert {"cpu", "cores", "gpu", "versions"} == set(report["machine"])


def test_goals_are_judged_on_the_fastest_of_ours(measured):
    report, _, printed = measured
    verdicts = {verdict["goal"]: verdict for verdict in report["goals"]}
    assert len(verdicts) == 4  # the fifth is for a GPU
    for verdict in verdicts.values():
        if verdict["met"] is not None:
            job = report["jobs"][verdict["job"]]
            assert verdict["loader"] == max(
                OURS, key=lambda name: spread(job["loaders"][name]["images_per_second"]).median
            )
            assert verdict["met"] == (verdict["median"] >= verdict["least"])
        assert verdict["goal"] in printed
    assert verdicts["8 times an in-memory Dataset + DataLoader"]["met"] is not None


def test_the_tables_name_every_loader(measured):
    report, markdown, printed = measured
    for loader in (*OURS, *BASELINES):
        assert loader in markdown and loader in printed
    assert report["machine"]["cpu"] in markdown


def test_ffcv_is_skipped_with_a_reason_where_it_is_not_installed(drawn, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(blocker := drawn.parent / "blocked"))
    (blocker / "ffcv").mkdir(parents=True, exist_ok=True)
    (blocker / "ffcv" / "__init__.py").write_text("raise ImportError('no module named ffcv')")
    arguments = [
        "--data-dir",
        str(drawn),
        "--batch-size",
        "16",
        "--rounds",
        "1",
        "--loaders",
        "ffcv",
        "--jobs",
        "crop",
        "--device",
        "cpu",
    ]
    assert input_pipeline.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "ffcv: skipped: not installed" in printed and "not measured: at least FFCV's speed" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loaders", "memry"], "did you mean 'memory'?"),
        (["--jobs", "flip"], "unknown job 'flip'"),
        (["--rounds", "0"], "--rounds: must be at least 1"),
    ],
)
def test_unknown_names_are_rejected(arguments, message, capsys):
    with pytest.raises(SystemExit):
        input_pipeline.main(arguments)
    assert message in capsys.readouterr().err


def test_a_batch_larger_than_the_dataset_is_rejected(drawn, capsys):
    assert input_pipeline.main(["--data-dir", str(drawn), "--device", "cpu"]) == 1
    assert "fewer than one batch of 512" in capsys.readouterr().err


class Stub:
    """Stands for a loader; ends the measurement in its second turn."""

    versions: dict[str, str] = {}

    def __init__(self):
        self.turns, self.is_closed = 0, False

    def warm_up(self) -> tuple[Window, float, float]:
        return Window(8, 8, 1.0), 0.0, 1.0

    def turn(self, epochs: int) -> Window:
        self.turns += 1
        if self.turns == 2:
            raise TimeoutError
        return Window(8, 8, 1.0)

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("missing", ["torchvision", "psutil"])
def test_a_loader_without_its_package_or_files_is_skipped(drawn, tmp_path, monkeypatch, missing):
    noise_dataset.write(tmp_path, 100)  # packed, without files
    for name in [missing, *sys.modules]:  # also what another test has imported of it
        if name.partition(".")[0] == missing:
            monkeypatch.setitem(sys.modules, name, None)
    file = tmp_path / "report.json"
    for folder, skipped in ((drawn, "memory"), (tmp_path, "imagefolder")):
        words = ["--data-dir", folder, "--loaders", f"{skipped},whole_batch", "--batch-size", 16, "--json", file]
        words += ["--jobs", "crop", "--device", "cpu", "--rounds", 1, "--turn-seconds", 0.01]
        assert input_pipeline.main(list(map(str, words))) == 0
        found = json.loads(file.read_text())["jobs"]["crop"]
        assert list(found["loaders"]) == ["whole_batch"] and found["skipped"][skipped]


def test_finished_turns_are_on_the_disk_and_loaders_are_closed(drawn, tmp_path, monkeypatch):
    stub = Stub()
    monkeypatch.setattr("benchmarks.lib.loaders.loaders", lambda python: {"tensor": lambda *_: stub})
    file = tmp_path / "input_pipeline.json"
    words = ["--data-dir", drawn, "--loaders", "tensor", "--batch-size", 16, "--device", "cpu", "--json", file]
    with pytest.raises(TimeoutError):
        input_pipeline.run(input_pipeline.parse_arguments(list(map(str, words))))
    assert input_figures(Check(tmp_path, 0, False, drawn, None), "") == {"crop, tensor": "8 images/s"}
    assert stub.is_closed


@pytest.mark.parametrize("name", ["tensor", "memory"])
def test_a_closed_loader_leaves_no_thread_and_no_process(drawn, name):
    before = set(threading.enumerate())
    loader = loaders()[name](Dataset.open(drawn), Task("crop", BATCH, 1, 1, torch.device("cpu")))
    loader.warm_up()
    loader.close()
    assert set(threading.enumerate()) <= before and not multiprocessing.active_children()


def test_turns_alternate_and_ratios_are_taken_by_round():
    order = []
    results = alternate({name: lambda name=name: order.append(name) or len(order) for name in "abc"}, rounds=3)
    assert "".join(order) == "abcabcabc"
    assert ratios(results["c"], results["a"]) == [3 / 1, 6 / 4, 9 / 7]
    assert spread([5, 1, 2]) == (1, 2, 5)
