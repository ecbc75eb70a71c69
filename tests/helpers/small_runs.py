"""The tiny preset and dataset of the tests, and the files of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

from records.run_folder import RunFolder

# Dropout and augmentation are on, so that resuming must restore random numbers. 300 images are 4 steps per epoch.
# With this eps, Adam does not turn the rounding of a gradient that is zero into a step, which depends on the CPU.
TINY = """
epochs = 12
[model]
patch = 8
width = 32
depth = 2
heads = 2
head_size = 16
feed_forward = "mlp"
feed_forward_options = { hidden = 48 }
dropout = 0.1
[engine]
train_batch_size = 64
[engine.optimizer.params]
lr = 3e-3
eps = 1e-4
"""
# Settings of a run of TINY whose first quarter of the steps has smaller images.
RESIZING = ["--set", "resizing.initial_scale=0.5", "--set", "resizing.fraction=0.25"]
TRAIN_PER_CLASS, TEST_PER_CLASS = 30, 7
EPOCHS, STEPS_PER_EPOCH = 12, 4  # they follow from TINY and the number of images
STOPPED = 75  # exit code of a run that stopped on request and saved


# --- files of a run -----------------------------------------------------------------------------------------------
# Bit-identical means: the bytes of weights.safetensors, and every number of metrics.jsonl that is not a time.


def results(record: RunFolder) -> list[dict]:
    """Return the lines of metrics.jsonl without timings and memory."""
    measured = ("_seconds", "_per_second", "_gib")
    return [{key: value for key, value in line.items() if not key.endswith(measured)} for line in record.metrics()]


def assert_same_as(record: RunFolder, unbroken: RunFolder) -> None:
    assert results(record) == results(unbroken)
    assert (record.folder / "weights.safetensors").read_bytes() == (
        unbroken.folder / "weights.safetensors"
    ).read_bytes()


def checkpoints(record: RunFolder) -> list[str]:
    return sorted(path.name for path in (record.folder / "state").iterdir())


def copy_of(record: RunFolder, folder: Path) -> RunFolder:
    return RunFolder(shutil.copytree(record.folder, folder))
