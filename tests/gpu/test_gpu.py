"""What only a GPU can show; skipped without one. Run: python -m pytest -m gpu tests/gpu/test_gpu.py"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import on_gpu

from common.paths import PROJECT
from config.settings import AugmentationSettings
from dali_pipeline import Batches
from image_data.dataset import Dataset

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
PLAIN = AugmentationSettings()
POLICIES = {
    "crop and flip": PLAIN,
    "resized crop": AugmentationSettings(resized_crop=True),
    "rand augment": AugmentationSettings(policy="rand_augment"),
    "trivial augment": AugmentationSettings(policy="trivial_augment"),
    "auto augment": AugmentationSettings(policy="auto_augment"),
    "colour jitter": AugmentationSettings(brightness=0.4, contrast=0.4, saturation=0.4),
    "erasing": AugmentationSettings(erasing=0.5),
    "mixing": AugmentationSettings(mixup=0.8, cutmix=1.0),
}


@pytest.fixture(scope="module")
def dataset(shapes) -> Dataset:
    return Dataset.open(shapes)


def levels(images: torch.Tensor, dataset: Dataset) -> torch.Tensor:
    """Normalised images in steps of 1/255."""
    return images.cpu() * torch.tensor(dataset.std).view(3, 1, 1) * 255


@pytest.mark.parametrize("source", ["resident", "files", "tensor"])
def test_evaluation_on_the_gpu_equals_the_cpu(dataset, source):
    gpu = torch.cat([images for images, _ in Batches(dataset, "test", 32, device="cuda", source=source).epoch()]).cpu()
    cpu = torch.cat([images for images, _ in Batches(dataset, "test", 32, source="tensor").epoch()])
    torch.testing.assert_close(gpu, cpu, atol=2e-6, rtol=0)


@pytest.mark.parametrize("source", ["resident", "files", "tensor"])
@pytest.mark.parametrize("name", list(POLICIES))
def test_training_batches_on_the_gpu_equal_the_cpu(dataset, source, name):
    """The plan is the same, so the pixels are, but for roundings of one level and points on the border of two pixels."""
    on = [
        Batches(dataset, "train", 100, seed=4, augmentation=POLICIES[name], device=d, source=s)
        for d, s in (("cuda", source), ("cpu", "tensor"))
    ]
    for (gpu, gpu_labels), (cpu, cpu_labels) in zip(on[0].epoch(1), on[1].epoch(1), strict=True):
        torch.testing.assert_close(gpu_labels.cpu(), cpu_labels)
        difference = (levels(gpu, dataset) - levels(cpu, dataset)).abs()
        assert (difference > 1.01).float().mean() < 0.02, name


def statistics(batches: Batches) -> torch.Tensor:
    """Mean and standard deviation of each channel over three epochs: (2, 3)."""
    images = torch.cat([images.cpu() for epoch in range(3) for images, _ in batches.epoch(epoch)])
    return torch.stack([images.mean(dim=(0, 2, 3)), images.std(dim=(0, 2, 3))])


@pytest.mark.parametrize("source", ["resident", "files"])
@pytest.mark.parametrize("name", ["crop and flip", "resized crop", "rand augment", "erasing"])
def test_statistics_of_dali_on_the_gpu_are_those_of_dali_on_the_cpu(dataset, source, name):
    """What a network is shown over some epochs, whatever a single pixel is."""
    gpu, cpu = (
        statistics(Batches(dataset, "train", 100, seed=4, augmentation=POLICIES[name], device=d, source=source))
        for d in ("cuda", "cpu")
    )
    torch.testing.assert_close(gpu, cpu, atol=0.01, rtol=0)


@pytest.mark.parametrize("source", ["resident", "files", "tensor"])
def test_any_batch_can_be_asked_for(dataset, source):
    def make():
        return Batches(
            dataset,
            "train",
            50,
            seed=3,
            augmentation=AugmentationSettings(policy="rand_augment"),
            device="cuda",
            source=source,
        )

    whole = [images.clone() for images, _ in make().epoch(0)]
    again = [images.clone() for images, _ in make().epoch(0, start=3)]
    assert len(again) == len(whole) - 3 and all(torch.equal(a, b) for a, b in zip(again, whole[3:], strict=True))


PLAINLY = ["--set", "model.dropout=0.0", "--set", "compile=off"]


@pytest.fixture(scope="module")
def trained(shapes, tiny, tmp_path_factory) -> dict[str, Path]:
    """One run for each ZeRO stage and precision, by name."""
    runs = tmp_path_factory.mktemp("gpu-runs")
    cases = {
        f"stage{stage}-{p}": (stage, p == "bf16")
        for stage, p in ((0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
    }
    for name, (stage, bf16) in cases.items():
        done = on_gpu(
            "train.py",
            "--preset",
            tiny,
            "--data-dir",
            shapes,
            "--runs-dir",
            runs,
            "--name",
            name,
            "--epochs",
            12,
            "--set",
            f"zero_optimization.stage={stage}",
            "--set",
            f"bf16.enabled={str(bf16).lower()}",
            *PLAINLY,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return {name: runs / name for name in cases}


def last_line(run: Path) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_every_stage_and_precision_learns_the_same(trained):
    losses = {name: last_line(run)["train_loss"] for name, run in trained.items()}
    first = json.loads((trained["stage0-fp32"] / "metrics.jsonl").read_text().splitlines()[0])["train_loss"]
    reference = losses["stage0-fp32"]
    assert reference < 0.92 * first
    for name, loss in losses.items():
        assert abs(loss - reference) < (0.15 if "bf16" in name else 0.02) * reference, losses


def test_a_gpu_run_is_evaluated_alike_on_gpu_and_cpu(trained, tmp_path):
    run = trained["stage1-fp32"]
    counts = {}
    for where, environment in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        report = tmp_path / f"{where}.json"
        done = subprocess.run(
            [sys.executable, "evaluate.py", str(run), "--json", str(report)],
            cwd=PROJECT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        counts[where] = json.loads(report.read_text())
    assert counts["gpu"]["correct"] == counts["cpu"]["correct"] == last_line(run)["test_correct"]
    np.testing.assert_allclose(counts["gpu"]["loss"], counts["cpu"]["loss"], rtol=1e-4)


def test_a_stopped_gpu_run_goes_on_where_it_stopped(shapes, tiny, tmp_path, trained):
    common = [
        "train.py",
        "--preset",
        tiny,
        "--data-dir",
        shapes,
        "--runs-dir",
        tmp_path,
        "--name",
        "again",
        "--epochs",
        12,
        "--set",
        "zero_optimization.stage=1",
        "--set",
        "bf16.enabled=false",
        *PLAINLY,
    ]
    assert on_gpu(*common, "--stop-at", 21).returncode == 75
    done = on_gpu(*common)
    assert done.returncode == 0 and "resuming  after step 21" in done.stdout, done.stdout + done.stderr
    assert abs(last_line(tmp_path / "again")["train_loss"] - last_line(trained["stage1-fp32"])["train_loss"]) < 1e-3


CONVOLUTIONS = ["--set", "model.patch_embedding=conv_stem", "--set", "model.patch_embedding_options.layers=3"]
FASTER = {  # name: what trains as the same without it does
    "compile": (["--set", "compile=on"], []),
    "compile, bf16": (["--set", "compile=on", "--set", "bf16.enabled=true"], ["--set", "bf16.enabled=true"]),
    "compile, fsdp": (["--strategy", "fsdp", "--set", "compile=on"], []),
    "CUDA graphs": (["--strategy", "ddp", "--set", "compile=reduce-overhead"], []),
    "CUDA graphs, accumulated": (
        ["--strategy", "ddp", "--set", "compile=reduce-overhead", "--set", "gradient_accumulation_steps=2"],
        [],
    ),
    "channels last": (["--set", "channels_last=true", *CONVOLUTIONS], CONVOLUTIONS),
    "Muon with an average": (
        ["--set", "optimizer.type=Muon", "--set", "ema.decay=0.9"],
        ["--set", "optimizer.type=Muon"],
    ),
    "offloaded": (["--set", "zero_optimization.offload_optimizer.device=cpu"], []),
}


@pytest.mark.parametrize("name", FASTER)
def test_what_makes_it_faster_or_smaller_trains_the_same(shapes, tiny, tmp_path, name):
    losses = []
    for i, more in enumerate(FASTER[name]):
        off = [] if any("compile" in word for word in more) else ["--set", "compile=off"]
        done = on_gpu(
            "train.py",
            "--preset",
            tiny,
            "--data-dir",
            shapes,
            "--runs-dir",
            tmp_path,
            "--name",
            f"{i}",
            "--epochs",
            4,
            "--set",
            "model.dropout=0.0",
            *off,
            *more,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [json.loads(line) for line in (tmp_path / f"{i}" / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train_loss"] for line in lines])
        assert lines[0]["warmup_seconds"] > 0 and lines[1]["warmup_seconds"] == 0
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.05 if "bf16" in name else 5e-3)
