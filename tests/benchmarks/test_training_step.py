"""benchmarks/training_step.py: all systems do the same work, and its figures follow from the measurements. No speeds.

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
from torch import nn

from benchmarks import training_step
from benchmarks.lib import memory_floor, step_report
from benchmarks.lib.check import Check
from benchmarks.lib.gpu_check_parts import step_figures
from benchmarks.lib.peak_flops import PEAKS, data_sheet, measured_flops
from benchmarks.lib.step_breakdown import PARTS, Marks
from benchmarks.lib.workload import Subject
from config.settings import resolve
from models.cost import count_flops

STEPS, WARM_UP, ROUNDS = 2, 1, 2
SAME_STEPS = ["ddp", "zero 1", "bare", "timm"]  # in fp32


@pytest.fixture(scope="module")
def context():
    """Systems are forked with PyTorch in memory."""
    with mock.patch.dict(os.environ, programs.ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def measured(shapes, tiny, context, tmp_path_factory) -> tuple[dict, Path]:
    """The JSON of a small run of all systems, in both precisions, and its folder."""
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


def test_all_systems_ran_or_report_the_reason(measured):
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
    assert set(left_out) <= {"lightning", "lightning, bf16"}  # an optional baseline
    assert all("not installed" in reason for reason in left_out.values())


def test_all_systems_train_the_same_steps(measured):
    report, _ = measured
    found = rows(report)
    for label in SAME_STEPS:
        assert found[label]["loss"] == pytest.approx(found["bare"]["loss"], rel=1e-5), label
        assert found[f"{label}, bf16"]["loss"] == pytest.approx(found["bare"]["loss"], rel=0.02), label
    assert found["zero 1, bf16"]["loss"] == pytest.approx(found["bare, bf16 weights"]["loss"], rel=1e-3)
    assert len({row["num_parameters"] for row in found.values()}) == 1


def test_figures_follow_from_the_measurements(measured):
    report, _ = measured
    for label, row in rows(report).items():
        peak = report["peaks"]["bf16" if row["bf16"] else "fp32"]
        assert len(row["seconds"]) == ROUNDS
        assert row["mfu"] is None and peak["data_sheet"] is None  # there are no data sheets of CPUs
        memory = report["memory"]
        floor = memory["bytes_per_step"]["bf16" if row["bf16"] else "fp32"] / memory["copy_bytes_per_second"]
        assert row["of_memory_floor"] == pytest.approx([floor * STEPS / seconds for seconds in row["seconds"]])
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


def test_a_step_is_divided_into_all_parts(measured):
    report, _ = measured
    found = rows(report)
    for label in ("ddp", "zero 1", "bare", "ddp, bf16", "zero 1, bf16"):
        parts = found[label]["parts"]
        assert set(parts) == set(PARTS)
        assert min(parts[part] for part in ("forward", "loss", "backward", "optimizer")) > 0, label
    assert found["timm"]["parts"] is None and found["timm"]["no_parts"]


def test_the_tables_name_every_system(measured):
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


def test_two_processes_report_their_communication(shapes, tiny, context, capsys):
    assert (
        training_step.main(
            [
                "--data-dir",
                str(shapes),
                "--preset",
                str(tiny),
                "--strategies",
                "ddp",
                "--baselines",
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
    assert "communication" in printed and "timm: skipped: measured with one process only" in printed


def test_one_system_at_a_time_gives_the_same_rows(shapes, tiny, context, tmp_path):
    """Sequential turns: a system ends before the next one starts. The flag --peers still works."""
    words = [
        "--strategies",
        "ddp",
        "--peers",
        "bare",
        "--steps",
        "1",
        "--warm-up",
        "1",
        "--rounds",
        "2",
        "--threads",
        "1",
    ]
    words += ["--turns", "sequential", "--set", "model.dropout=0.0", "--json", str(tmp_path / "step.json")]
    at_once = []

    def start(system, given):
        at_once.append([other.label for other in started if other.children])
        started.append(system)
        return original(system, given)

    started, original = [], training_step.System.start
    with mock.patch.object(training_step.System, "start", start):
        assert training_step.main(["--data-dir", str(shapes), "--preset", str(tiny), *words], context) == 0
    found = rows(json.loads((tmp_path / "step.json").read_text()))
    assert at_once == [[], []] and list(found) == ["ddp", "bare"]
    assert found["ddp"]["loss"] == pytest.approx(found["bare"]["loss"], rel=1e-5)
    assert len(found["ddp"]["time_ratio"]) == 2


def test_the_systems_measured_so_far_are_on_the_disk(shapes, tiny, tmp_path, monkeypatch):
    def measure_group(systems, context):
        if systems[0].name == "bare":
            raise TimeoutError
        return [{"label": "ddp", "left_out": None, "images_per_second": [90.0, 100.0, 110.0]}]

    monkeypatch.setattr(training_step, "measure_group", measure_group)
    file = tmp_path / "training_step.json"
    words = ["--data-dir", shapes, "--preset", tiny, "--strategies", "ddp", "--turns", "sequential", "--json", file]
    with pytest.raises(TimeoutError):
        training_step.run(training_step.parse_arguments(list(map(str, words))), None)
    assert step_figures(Check(tmp_path, 0, False, shapes, None), "") == {"ddp": "100 images/s"}


def test_baselines_use_channels_last_and_the_compile_mode(shapes, tiny, monkeypatch):
    """As our engines do, so that the comparison is about the loop."""
    from benchmarks.lib import step_baselines

    seen = {}

    def prepared(loop):
        loop.optimizer = loop.adamw(list(loop.network.parameters()))

    stem = ["model.patch_embedding=conv_stem", "model.patch_embedding_options.layers=3"]
    overrides = ["channels_last=true", *stem, "optimizer.type=AdamW"]
    settings = resolve(str(tiny), overrides, strategy="ddp")
    monkeypatch.setattr(step_baselines.Bare, "prepare", prepared)
    monkeypatch.setattr(step_baselines.process_group, "init_process_group", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch, "compile", lambda model, mode: seen.update(mode=mode) or model)
    monkeypatch.setenv("RANK", "0")
    request = {"processes": 1, "source": "tensor", "synthetic": True, "compile": "max-autotune"}
    loop = step_baselines.Bare(Subject(settings, shapes), request)
    images, _ = loop.batch()
    assert images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    assert seen == {"mode": "max-autotune"}
    loop.feed.batches.close()


def test_timm_accumulates_gradients_as_the_bare_loop_does(shapes, tiny, monkeypatch):
    from benchmarks.lib import step_baselines

    overrides = ["gradient_accumulation_steps=2", "optimizer.type=AdamW", "model.dropout=0.0", "bf16.enabled=false"]
    settings = resolve(str(tiny), overrides, strategy="ddp")
    monkeypatch.setattr(step_baselines.process_group, "init_process_group", lambda: torch.device("cpu"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    request = {"processes": 1, "source": "tensor", "synthetic": False, "compile": "off"}
    losses = {}
    for form in (step_baselines.Bare, step_baselines.Timm):
        loop = form(Subject(settings, shapes), request)
        assert loop.sizes.accumulation == 2
        losses[form] = torch.stack(loop.steps(3)).tolist()
        loop.feed.batches.close()
    assert losses[step_baselines.Timm] == pytest.approx(losses[step_baselines.Bare], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "optimizer"),
    [
        ([], "optimizer.type=AdamW"),
        (["--baselines", "none"], None),
        (["--set", "optimizer.type=Muon"], "optimizer.type=Muon"),
    ],
)
def test_the_optimizer_is_the_one_of_the_baselines(arguments, optimizer):
    assert training_step.parse_arguments(["--preset", "cpu", *arguments]).set == ([optimizer] if optimizer else [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategies", "pipelin"], "unknown strategy 'pipelin'"),
        (["--precision", "fp16"], "unknown precision 'fp16'"),
        (["--strategies", "none", "--baselines", "none"], "nothing to measure"),
        (["--compile", "fast"], "unknown mode 'fast'"),
        (["--steps", "0"], "--steps: must be at least 1"),
    ],
)
def test_invalid_flags_are_rejected(arguments, message, capsys):
    with pytest.raises(SystemExit):
        training_step.main(arguments)
    assert message in capsys.readouterr().err


def test_an_unknown_setting_is_named(shapes, capsys):
    assert training_step.main(["--data-dir", str(shapes), "--set", "model.widht=3"]) == 1
    assert "did you mean 'model.width'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
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


@pytest.mark.parametrize(
    ("arguments", "modes"),
    [
        ([], ["off"]),
        (["--compile", "both"], ["off", "on"]),
        (["--compile", "reduce-overhead,on"], ["on", "reduce-overhead"]),
    ],
)
def test_compile_takes_modes(arguments, modes):
    assert training_step.parse_arguments(arguments).compile == modes


def test_the_memory_traffic_of_an_mlp_is_what_a_fused_implementation_moves():
    """(N, a) -> Linear -> GELU -> Linear -> (N, k): counted by hand, in fp32."""
    N, a, b, k = 64, 32, 128, 16
    network = lambda: nn.Sequential(nn.Flatten(), nn.Linear(a, b), nn.GELU(), nn.Linear(b, k))  # noqa: E731
    counted = memory_floor.pass_bytes(network, (N, a // 2, 1, 2), False, torch.device("cpu"))
    x, h, y, v, w = N * a, N * b, N * k, a * b, b * k  # elements of input, hidden, scores and the two weights
    forward = (x + v + b + h) + (h + h) + (h + w + k + y)
    loss = 2 * y  # reads the scores, writes their gradient
    # The gradients of the biases are sums that are fused with the loss and with the derivative of GELU.
    backward = (y + w + h) + (y + h + w) + k + (h + h + h) + (h + x + v) + b
    assert counted == pytest.approx(4 * (forward + loss + backward), rel=0.02)


def test_fusion_ends_at_a_matrix_product():
    """A residual around a matrix product is read twice: before the product and after it."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = nn.Linear(64, 64, bias=False)

        def forward(self, images):
            x = images.flatten(1).sin()
            return x + self.product(x.cos())

    recorder = memory_floor.RecordTraffic()
    with torch.no_grad(), recorder:
        Residual()(torch.ones(256, 1, 8, 8))
    recorded = [one for one in recorder.operations if not one.separate and one.depth == 0 or one.depth]
    n = 4 * 256 * 64
    total = memory_floor.fused_bytes(recorded[-4:])  # sin, cos, product, sum
    assert total == (n + 2 * n) + (n + 4 * 64 * 64 + n) + (2 * n + n)


@pytest.mark.parametrize(("kind", "states"), [("AdamW", 2), ("Muon", 1)])
def test_an_update_reads_the_gradient_and_moves_parameter_and_state_twice(kind, states):
    assert memory_floor.optimizer_bytes(10, kind) == 4 * 10 * (1 + 2 + 2 * states)


def test_a_copy_counts_bytes_read_and_written(monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr("benchmarks.lib.memory_floor.time.perf_counter", lambda: float(next(ticks)))
    assert memory_floor.copy_bandwidth(torch.device("cpu"), repeats=2) == 2 * memory_floor.COPY_BYTES["cpu"]


def test_a_product_of_matrices_is_counted_right(monkeypatch):
    """FLOP/s are operations by seconds: with a clock of one second per reading, 2 x 1024^3."""
    ticks = iter(range(1000))
    monkeypatch.setattr("benchmarks.lib.peak_flops.time.perf_counter", lambda: float(next(ticks)))
    assert measured_flops(torch.device("cpu"), bf16=False, seconds=5) == 2 * 1024**3
    assert measured_flops(torch.device("cpu"), bf16=False, seconds=0) == 2 * 1024**3, "one product takes longer"
    assert count_flops(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 10)), 4, "cpu") == 2 * 48 * 10


def test_marks_cover_the_time_without_gaps(monkeypatch):
    """When a part begins again before the next one, its earlier time counts toward the part before."""
    clock = iter([0.0, 1.0, 3.0, 4.0, 6.0, 10.0])
    monkeypatch.setattr("benchmarks.lib.step_breakdown.time.perf_counter", lambda: next(clock))
    marks = Marks(torch.device("cpu"))
    marks("forward")
    marks("backward")
    marks.again("clip and exchange")
    marks.again("clip and exchange")
    marks("optimizer")
    marks("rest")
    assert {part: seconds for part, seconds in marks.seconds().items() if seconds} == {
        "forward": 1.0,
        "backward": 3.0,
        "clip and exchange": 2.0,
        "optimizer": 4.0,
    }
