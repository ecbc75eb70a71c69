"""Stopping and going on with a GPU, and its memory; skipped without one. Run: python -m pytest -m gpu tests/gpu/test_gpu_resume.py"""

from __future__ import annotations

import pytest
import torch
from programs import on_gpu
from small_runs import EPOCHS, STEPS_PER_EPOCH, STOPPED, assert_same_as

from records.run_folder import RunFolder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize(
    "more", [["--strategy", "ddp"], ["--set", "bf16.enabled=true"]], ids=["ddp in fp32", "zero in bf16"]
)
def test_a_deterministic_run_goes_on_with_the_same_bits(shapes, tiny, tmp_path, more):
    common = ["train.py", "--preset", tiny, "--data-dir", shapes, "--runs-dir", tmp_path, "--deterministic", *more]
    done = on_gpu(*common, "--name", "unbroken")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        on_gpu(
            *common, "--name", "stopped", "--stop-at", 5 * STEPS_PER_EPOCH + 1, "--checkpoint-every", "2steps"
        ).returncode
        == STOPPED
    )
    done = on_gpu(*common, "--name", "stopped")
    assert (
        done.returncode == 0
        and f"resuming  after step {5 * STEPS_PER_EPOCH + 1} of {EPOCHS * STEPS_PER_EPOCH}" in done.stdout
    ), done.stderr
    assert_same_as(RunFolder(tmp_path / "stopped"), RunFolder(tmp_path / "unbroken"))


def test_from_the_gpu_to_the_cpu_only_when_allowed(shapes, tiny, tmp_path):
    common = [
        "train.py",
        "--preset",
        tiny,
        "--data-dir",
        shapes,
        "--runs-dir",
        tmp_path,
        "--name",
        "moved",
        "--source",
        "tensor",
    ]
    assert on_gpu(*common, "--stop-at", 6).returncode == STOPPED
    on_cpu = [
        "-c",
        "import os, runpy, sys; os.environ['CUDA_VISIBLE_DEVICES'] = ''; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], "
        "run_name='__main__')",
        *common,
    ]
    refused = on_gpu(*on_cpu)
    assert refused.returncode == 1 and "device type: GPU before, CPU now" in refused.stderr
    done = on_gpu(*on_cpu, "--allow-inexact-resume")
    assert done.returncode == 0 and "resuming  after step 6" in done.stdout, done.stderr


def test_the_largest_micro_batch_is_found_and_too_large_a_one_is_told_with_the_one_that_fits(shapes, tmp_path):
    """A network whose activations fill any GPU at this batch."""
    wide = tmp_path / "wide.toml"
    wide.write_text(
        'epochs = 1\n[model]\npatch = 1\nwidth = 1024\ndepth = 12\nheads = 16\nhead_size = 64\npooling = "mean"\n'
        "feed_forward_options = { hidden = 4096 }\n[engine]\ntrain_batch_size = 256\n"
    )
    common = [
        "train.py",
        "--preset",
        wide,
        "--data-dir",
        shapes,
        "--runs-dir",
        tmp_path,
        "--max-steps",
        1,
        "--name",
        "wide",
    ]
    full = on_gpu(*common)
    assert full.returncode == 1 and "out of GPU memory with a micro-batch of 256 images; " in full.stderr, full.stderr
    done = on_gpu(*common, "--micro-batch", "auto")
    assert done.returncode == 0 and "the largest that the GPU has room for" in done.stdout, done.stderr
    assert RunFolder(tmp_path / "wide").facts()["batch"]["total"] == 256
