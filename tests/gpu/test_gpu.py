"""What only a GPU can show; skipped without one. Run: python -m pytest -m gpu tests/gpu/test_gpu.py

Tests that need DALI or DeepSpeed have a form with the source `tensor` or the strategy ddp, which needs neither.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from programs import on_gpu

from common.packages import is_installed
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
    "color jitter": AugmentationSettings(brightness=0.4, contrast=0.4, saturation=0.4),
    "erasing": AugmentationSettings(erasing=0.5),
    "mixing": AugmentationSettings(mixup=0.8, cutmix=1.0),
}
SOURCES = [
    pytest.param("resident", marks=pytest.mark.needs_dali),
    pytest.param("files", marks=pytest.mark.needs_dali),
    "tensor",
]
STRATEGIES = [pytest.param("zero", marks=pytest.mark.needs_deepspeed), "ddp"]
WITHOUT_DALI = [] if is_installed("nvidia.dali") else ["tensor"]
SOURCE = [word for source in WITHOUT_DALI for word in ("--source", source)]


@pytest.fixture(scope="module")
def dataset(shapes) -> Dataset:
    return Dataset.open(shapes)


def levels(images: torch.Tensor, dataset: Dataset) -> torch.Tensor:
    """Return normalized images in steps of 1/255."""
    return images.cpu() * torch.tensor(dataset.std).view(3, 1, 1) * 255


@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_on_the_gpu_equals_the_cpu(dataset, source):
    gpu = torch.cat([images for images, _ in Batches(dataset, "test", 32, device="cuda", source=source).epoch()]).cpu()
    cpu = torch.cat([images for images, _ in Batches(dataset, "test", 32, source="tensor").epoch()])
    torch.testing.assert_close(gpu, cpu, atol=2e-6, rtol=0)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", list(POLICIES))
def test_training_batches_on_the_gpu_equal_the_cpu(dataset, source, name):
    """The plan is the same, so the pixels are, except for rounding by one level and points between two pixels."""
    on = [
        Batches(dataset, "train", 100, seed=4, augmentation=POLICIES[name], device=d, source=s)
        for d, s in (("cuda", source), ("cpu", "tensor"))
    ]
    for (gpu, gpu_labels), (cpu, cpu_labels) in zip(on[0].epoch(1), on[1].epoch(1), strict=True):
        torch.testing.assert_close(gpu_labels.cpu(), cpu_labels)
        difference = (levels(gpu, dataset) - levels(cpu, dataset)).abs()
        assert (difference > 1.01).float().mean() < 0.02, name


def statistics(batches: Batches) -> torch.Tensor:
    """Return mean and standard deviation of each channel over three epochs: (2, 3)."""
    images = torch.cat([images.cpu() for epoch in range(3) for images, _ in batches.epoch(epoch)])
    return torch.stack([images.mean(dim=(0, 2, 3)), images.std(dim=(0, 2, 3))])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["crop and flip", "resized crop", "rand augment", "erasing"])
def test_statistics_on_the_gpu_equal_those_on_the_cpu(dataset, source, name):
    """Over several epochs, whatever a single pixel is."""
    gpu, cpu = (
        statistics(Batches(dataset, "train", 100, seed=4, augmentation=POLICIES[name], device=d, source=source))
        for d in ("cuda", "cpu")
    )
    torch.testing.assert_close(gpu, cpu, atol=0.01, rtol=0)


@pytest.mark.parametrize("source", SOURCES)
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

    full = [images.clone() for images, _ in make().epoch(0)]
    again = [images.clone() for images, _ in make().epoch(0, start=3)]
    assert len(again) == len(full) - 3 and all(torch.equal(a, b) for a, b in zip(again, full[3:], strict=True))


DETERMINISTIC = ["--set", "model.dropout=0.0", "--set", "compile=off"]
FORMS = {  # strategy -> name of a run -> flags
    "ddp": {
        f"ddp-{p}": ["--strategy", "ddp", "--set", f"bf16.enabled={p == 'bf16'}".lower()] for p in ("fp32", "bf16")
    },
    "zero": {
        f"stage{stage}-{p}": [
            *("--strategy", "zero", "--set", f"zero_optimization.stage={stage}"),
            *("--set", f"bf16.enabled={p == 'bf16'}".lower()),
        ]
        for stage, p in ((0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
    },
}
REFERENCE = {"ddp": "ddp-fp32", "zero": "stage1-fp32"}


@pytest.fixture(scope="module")
def trained(shapes, tiny, tmp_path_factory):
    """Return a function: the run of a strategy and name, trained at its first use."""
    runs = tmp_path_factory.mktemp("gpu-runs")

    def run(strategy: str, name: str) -> Path:
        if not (runs / name).exists():
            common = ["--preset", tiny, "--data-dir", shapes, "--runs-dir", runs, "--name", name, "--epochs", 12]
            done = on_gpu("train.py", *common, *SOURCE, *FORMS[strategy][name], *DETERMINISTIC)
            assert done.returncode == 0, done.stdout + done.stderr
        return runs / name

    return run


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_stage_and_precision_trains_the_same(trained, strategy):
    losses = {name: metrics(trained(strategy, name))[-1]["train_loss"] for name in FORMS[strategy]}
    first = metrics(trained(strategy, REFERENCE[strategy]))[0]["train_loss"]
    reference = losses[REFERENCE[strategy]]
    assert reference < 0.92 * first
    for name, loss in losses.items():
        assert abs(loss - reference) < (0.15 if "bf16" in name else 0.02) * reference, losses


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluation_agrees_on_gpu_and_cpu(trained, tmp_path, strategy):
    run = trained(strategy, REFERENCE[strategy])
    counts = {}
    for where, environment in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        report = tmp_path / f"{where}.json"
        done = subprocess.run(
            [sys.executable, "evaluate.py", str(run), "--json", str(report), *SOURCE],
            cwd=PROJECT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        counts[where] = json.loads(report.read_text())
    assert counts["gpu"]["correct"] == counts["cpu"]["correct"] == metrics(run)[-1]["test_correct"]
    np.testing.assert_allclose(counts["gpu"]["loss"], counts["cpu"]["loss"], rtol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stopped_run_resumes(shapes, tiny, tmp_path, trained, strategy):
    words = FORMS[strategy][REFERENCE[strategy]]
    common = ["--preset", tiny, "--data-dir", shapes, "--runs-dir", tmp_path, "--name", "again", "--epochs", 12]
    common = ["train.py", *common, *SOURCE, *words, *DETERMINISTIC]
    assert on_gpu(*common, "--stop-at", 21).returncode == 75
    done = on_gpu(*common)
    assert done.returncode == 0 and "resuming  after step 21" in done.stdout, done.stdout + done.stderr
    losses = [metrics(run)[-1]["train_loss"] for run in (tmp_path / "again", trained(strategy, REFERENCE[strategy]))]
    assert abs(losses[0] - losses[1]) < 1e-3


CONVOLUTIONS = ["--set", "model.patch_embedding=conv_stem", "--set", "model.patch_embedding_options.layers=3"]
DDP, ZERO = ["--strategy", "ddp"], ["--strategy", "zero"]
BF16, MUON = ["--set", "bf16.enabled=true"], ["--set", "optimizer.type=Muon"]
MASTERS, GRAPHS = ["--set", "bf16.enabled=masters"], ["--set", "compile=reduce-overhead"]
FASTER = {  # name: flags of a run, and of the run that it must equal
    "compile": ([*DDP, "--set", "compile=on"], DDP),
    "compile, bf16": ([*DDP, "--set", "compile=on", *BF16], [*DDP, *BF16]),
    "compile, zero": ([*ZERO, "--set", "compile=on"], ZERO),
    "compile, fsdp": (["--strategy", "fsdp", "--set", "compile=on"], DDP),
    "CUDA graphs": ([*DDP, *GRAPHS], DDP),
    "CUDA graphs, accumulated": ([*DDP, *GRAPHS, "--set", "gradient_accumulation_steps=2"], DDP),
    "CUDA graphs, bf16 masters": ([*DDP, *GRAPHS, *MASTERS], [*DDP, *BF16]),
    "bf16 masters": ([*DDP, *MASTERS], [*DDP, *BF16]),
    "compile, bf16 masters": ([*DDP, *MASTERS, "--set", "compile=on"], [*DDP, *BF16]),
    "compiled evaluation": (
        [*DDP, "--set", "compile=on", "--set", "compile_evaluation=true"],
        [*DDP, "--set", "compile=on"],
    ),
    "channels last": ([*DDP, "--set", "channels_last=true", *CONVOLUTIONS], [*DDP, *CONVOLUTIONS]),
    "Muon with EMA": ([*DDP, *MUON, "--set", "ema.decay=0.9"], [*DDP, *MUON]),
    "Muon with EMA, zero": ([*ZERO, *MUON, "--set", "ema.decay=0.9"], [*ZERO, *MUON]),
    "offloaded, zero": ([*ZERO, "--set", "zero_optimization.offload_optimizer.device=cpu"], ZERO),
}
NAMES = [pytest.param(name, marks=[pytest.mark.needs_deepspeed] * ("zero" in name), id=name) for name in FASTER]


@pytest.mark.parametrize("name", NAMES)
def test_faster_or_smaller_configurations_have_the_same_losses(shapes, tiny, tmp_path, name):
    losses = []
    for i, more in enumerate(FASTER[name]):
        off = [] if any("compile" in word for word in more) else ["--set", "compile=off"]
        places = ["--preset", tiny, "--data-dir", shapes, "--runs-dir", tmp_path, "--name", f"{i}", "--epochs", 4]
        done = on_gpu("train.py", *places, *SOURCE, "--set", "model.dropout=0.0", *off, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = metrics(tmp_path / f"{i}")
        losses.append([line["train_loss"] for line in lines])
        assert lines[0]["warmup_seconds"] > 0 and lines[1]["warmup_seconds"] == 0
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.05 if "bf16" in name else 5e-3)


@torch.no_grad()
def test_convolutions_in_fp32_are_not_rounded_to_tf32():
    """PyTorch's are by default."""
    engine = reference.make_engine("ddp", reference.settings_for("compile=off"))
    convolution = torch.nn.Conv2d(64, 64, 3).to(engine.device)
    images = torch.randn(8, 64, 16, 16, device=engine.device)
    found = convolution(images).double()
    torch.testing.assert_close(found, convolution.double()(images.double()), rtol=0, atol=1e-5)
    engine.close()


@pytest.mark.needs_deepspeed
def test_zero_by_autocast_computes_in_bf16_as_ddp_does():
    """DeepSpeed disables an autocast that is entered around its engine, on a GPU only."""
    losses, types, engine = [], [], None
    for strategy in ("zero", "ddp"):
        found: set[torch.dtype] = set()
        engine = reference.make_engine(strategy, reference.settings_for("bf16.enabled=autocast", "compile=off"))
        for layer in engine.network().modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda layer, inputs, output, found=found: found.add(output.dtype))
        images, labels = (part[0].to(engine.device) for part in reference.data())
        losses.append([engine.train_batch(iter([(images, labels)])).item() for _ in range(5)])
        engine.forward(images)
        types.append(found)
    assert engine is not None
    engine.close()
    assert types == [{torch.bfloat16}] * 2
    np.testing.assert_allclose(*losses, rtol=5e-3)


def test_random_masks_are_new_in_every_replay():
    """With a learning rate of 0 and one batch, only the masks change the loss. Without them it is always the same."""
    found, engine = {}, None
    for mode in ("off", "on", "reduce-overhead"):
        for masks in ("model.dropout=0.5", "model.drop_path=0.5", "model.dropout=0.0"):
            settings = reference.settings_for(f"compile={mode}", "optimizer.params.lr=0.0", masks)
            engine = reference.make_engine("ddp", settings)
            images, labels = (part[0].to(engine.device) for part in reference.data())
            losses = [engine.train_batch(iter([(images, labels)])).item() for _ in range(10)]
            found[mode, masks] = len(set(losses[-4:]))  # after the steps that warm up and record
    assert engine is not None
    engine.close()
    assert found == {key: 1 if key[1] == "model.dropout=0.0" else 4 for key in found}
