"""Stopping and resuming on a GPU, and its memory; skipped without one.

python -m pytest -m gpu tests/gpu/test_gpu_resume.py
"""

from __future__ import annotations

import pytest
import torch
from programs import on_gpu
from small_runs import EPOCHS, STEPS_PER_EPOCH, STOPPED, assert_same_as

from records.run_folder import RunFolder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


BF16 = ["--set", "bf16.enabled=true"]
FORMS = [
    pytest.param(["--strategy", "ddp"], id="ddp in fp32"),
    pytest.param(["--strategy", "ddp", *BF16], id="ddp in bf16"),
    pytest.param(["--strategy", "zero", *BF16], id="zero in bf16", marks=pytest.mark.needs_deepspeed),
]


@pytest.mark.parametrize("more", FORMS)
def test_a_deterministic_run_resumes_with_the_same_bits(shapes, tiny, tmp_path, more):
    common = [
        "train.py",
        "--preset",
        tiny,
        "--data-dir",
        shapes,
        "--runs-dir",
        tmp_path,
        "--deterministic",
        "--source",
        "tensor",
    ]
    common += more
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


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero", marks=pytest.mark.needs_deepspeed)])
def test_a_gpu_run_resumes_on_a_cpu_only_when_allowed(shapes, tiny, tmp_path, strategy):
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
        "--strategy",
        strategy,
        "--source",
        "tensor",
    ]
    assert on_gpu(*common, "--stop-at", 6).returncode == STOPPED
    on_cpu = [
        "-c",
        "import os, runpy, sys; os.environ['CUDA_VISIBLE_DEVICES'] = ''; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')",
        *common,
    ]
    refused = on_gpu(*on_cpu)
    assert refused.returncode == 1 and "device type: GPU before, CPU now" in refused.stderr
    done = on_gpu(*on_cpu, "--allow-inexact-resume")
    assert done.returncode == 0 and "resuming  after step 6" in done.stdout, done.stderr


def test_the_largest_micro_batch_is_found_and_named_in_the_error_of_a_larger_one(shapes, tmp_path):
    """The activations of this network fill any GPU at this batch size."""
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
        "--strategy",
        "ddp",
        "--source",
        "tensor",
        "--max-steps",
        1,
        "--name",
        "wide",
    ]
    full = on_gpu(*common)
    assert full.returncode == 1 and "out of GPU memory with a micro-batch of 256 images; " in full.stderr, full.stderr
    done = on_gpu(*common, "--micro-batch", "auto")
    assert done.returncode == 0 and "the largest that fits into GPU memory" in done.stdout, done.stderr
    assert RunFolder(tmp_path / "wide").facts()["batch"]["total"] == 256
