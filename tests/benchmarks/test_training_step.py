"""benchmarks/training_step.py: all contenders do the same work, and its figures follow from what was measured. No speeds here.

pytest tests/benchmarks/test_training_step.py
"""

from __future__ import annotations

import json
import multiprocessing.forkserver
import os
from pathlib import Path
from unittest import mock

import programs
import pytest
import torch

from benchmarks import training_step
from benchmarks.lib import step_report
from benchmarks.lib.peak_flops import PEAKS, data_sheet, measured_flops
from benchmarks.lib.step_breakdown import PARTS, Marks
from models.cost import count_flops

STEPS, WARM_UP, ROUNDS = 2, 1, 2
SAME_STEPS = ["ddp", "zero 1", "bare", "timm"]  # in fp32


@pytest.fixture(scope="module")
def context():
    """Contenders are forked with PyTorch in memory."""
    with mock.patch.dict(os.environ, programs.ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def measured(shapes, tiny, context, tmp_path_factory) -> tuple[dict, Path]:
    """The JSON of a small run of everything, in both precisions, and its folder."""
    folder = tmp_path_factory.mktemp("step")
    code = training_step.main(
        [
            "--data-dir",
            str(shapes),
            "--preset",
            str(tiny),
            "--set",
            "model.dropout=0.0",
            "--precision",
            "fp32,bf16",
            "--steps",
            str(STEPS),
            "--warm-up",
            str(WARM_UP),
            "--rounds",
            str(ROUNDS),
            "--threads",
            "1",
            "--limit-seconds",
            "120",
            "--json",
            str(folder / "step.json"),
            "--markdown",
            str(folder / "step.md"),
        ],
        context,
    )
    assert code == 0
    return json.loads((folder / "step.json").read_text()), folder


def rows(report: dict) -> dict[str, dict]:
    return {row["label"]: row for row in report["rows"] if not row["left_out"]}


def test_all_contenders_ran_or_say_why_not(measured):
    report, _ = measured
    labels = [
        "ddp",
        "zero 1",
        "bare",
        "timm",
        "lightning",
        "ddp, bf16",
        "zero 1, bf16",
        "bare, bf16",
        "bare, bf16 weights",
        "timm, bf16",
        "lightning, bf16",
    ]
    assert [row["label"] for row in report["rows"]] == labels
    left_out = {row["label"]: row["left_out"] for row in report["rows"] if row["left_out"]}
    assert set(left_out) <= {"lightning", "lightning, bf16"}  # an optional peer
    assert all("not installed" in reason for reason in left_out.values())


def test_all_make_the_same_steps(measured):
    report, _ = measured
    found = rows(report)
    for label in SAME_STEPS:
        assert found[label]["loss"] == pytest.approx(found["bare"]["loss"], rel=1e-5), label
        assert found[f"{label}, bf16"]["loss"] == pytest.approx(found["bare"]["loss"], rel=0.02), label
    assert found["zero 1, bf16"]["loss"] == pytest.approx(found["bare, bf16 weights"]["loss"], rel=1e-3)
    assert len({row["num_parameters"] for row in found.values()}) == 1


def test_figures_follow_from_what_was_measured(measured):
    report, _ = measured
    for label, row in rows(report).items():
        peak = report["peaks"]["bf16" if row["bf16"] else "fp32"]
        assert (
            len(row["seconds"]) == ROUNDS and row["mfu"] is None and peak["data_sheet"] is None
        )  # a CPU has no data sheet here
        for i, seconds in enumerate(row["seconds"]):
            assert row["images_per_second"][i] == pytest.approx(STEPS * 64 / seconds)
            assert row["of_measured"][i] == pytest.approx(
                3 * report["flops_per_image"] * row["images_per_second"][i] / peak["measured"]
            )
        if label != "timm":
            against = rows(report)[row["against"]]
            assert row["time_ratio"] == pytest.approx(
                [a / b for a, b in zip(row["seconds"], against["seconds"], strict=True)]
            )
    assert (
        rows(report)["zero 1, bf16"]["against"] == "bare, bf16 weights"
        and rows(report)["ddp, bf16"]["against"] == "bare, bf16"
    )


def test_the_parts_of_a_step_are_all_there(measured):
    report, _ = measured
    found = rows(report)
    for label in ("ddp", "zero 1", "bare", "ddp, bf16", "zero 1, bf16"):
        parts = found[label]["parts"]
        assert set(parts) == set(PARTS)
        assert min(parts[part] for part in ("forward", "loss", "backward", "optimiser")) > 0, label
    assert found["timm"]["parts"] is None and found["timm"]["no_parts"]


def test_the_tables_name_every_contender(measured):
    report, folder = measured
    text, markdown = step_report.as_text(report), (folder / "step.md").read_text()
    for row in report["rows"]:
        assert row["label"] in text and row["label"] in markdown
    assert str(folder.parent) not in json.dumps(report) + markdown


def test_the_goal_is_judged_on_a_gpu_only(measured):
    report, _ = measured
    assert step_report.goals(report) == []
    on_gpu = {
        **report,
        "machine": {**report["machine"], "gpu": "H200"},
        "rows": [
            {**rows(report)["ddp"], "time_ratio": [1.0, 1.02, 1.2]},
            {**rows(report)["zero 1"], "time_ratio": [1.04, 1.05, 1.0]},
        ],
    }
    assert [line.partition(":")[0] for line in step_report.goals(on_gpu)] == ["met", "NOT met"]


def test_two_processes_say_how_much_is_communication(shapes, tiny, context, capsys):
    assert (
        training_step.main(
            [
                "--data-dir",
                str(shapes),
                "--preset",
                str(tiny),
                "--strategies",
                "ddp",
                "--peers",
                "timm,bare",
                "--processes",
                "2",
                "--steps",
                "1",
                "--warm-up",
                "1",
                "--rounds",
                "1",
                "--threads",
                "1",
            ],
            context,
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "of it communication" in printed and "timm: left out: compared on one process only" in printed


@pytest.mark.parametrize(
    ("arguments", "optimizer"),
    [
        ([], "optimizer.type=AdamW"),
        (["--peers", "none"], None),
        (["--set", "optimizer.type=Muon"], "optimizer.type=Muon"),
    ],
)
def test_a_preset_with_another_optimiser_is_measured_with_the_peers_one(arguments, optimizer):
    assert training_step.parse_arguments(["--preset", "cpu", *arguments]).set == ([optimizer] if optimizer else [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategies", "pipelin"], "unknown strategy 'pipelin'"),
        (["--precision", "fp16"], "unknown precision 'fp16'"),
        (["--strategies", "none", "--peers", "none"], "nothing to measure"),
        (["--steps", "0"], "--steps: must be at least 1"),
    ],
)
def test_unusable_flags_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        training_step.main(arguments)
    assert message in capsys.readouterr().err


def test_a_setting_that_does_not_exist_is_named(shapes, capsys):
    assert training_step.main(["--data-dir", str(shapes), "--set", "model.widht=3"]) == 1
    assert "did you mean 'model.width'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", None),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla V100-PCIE-16GB", "V100-PCIE"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_device_is_found_by_its_name(name, entry):
    assert data_sheet(name) == (PEAKS[entry] if entry else None)


def test_a_product_of_matrices_is_counted_right(monkeypatch):
    """The rate is the product's operations by its seconds: with a clock that takes one second a look, 2 x 1024^3."""
    ticks = iter(range(1000))
    monkeypatch.setattr("benchmarks.lib.peak_flops.time.perf_counter", lambda: float(next(ticks)))
    assert measured_flops(torch.device("cpu"), bf16=False, seconds=5) == 2 * 1024**3
    assert count_flops(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 10)), 4, "cpu") == 2 * 48 * 10


def test_marks_tile_the_time(monkeypatch):
    """A part that begins again before the next one counts its earlier beginning to the part before."""
    clock = iter([0.0, 1.0, 3.0, 4.0, 6.0, 10.0])
    monkeypatch.setattr("benchmarks.lib.step_breakdown.time.perf_counter", lambda: next(clock))
    marks = Marks(torch.device("cpu"))
    marks("forward")
    marks("backward")
    marks.again("clip and exchange")
    marks.again("clip and exchange")
    marks("optimiser")
    marks("rest")
    assert {part: seconds for part, seconds in marks.seconds().items() if seconds} == {
        "forward": 1.0,
        "backward": 3.0,
        "clip and exchange": 2.0,
        "optimiser": 4.0,
    }
