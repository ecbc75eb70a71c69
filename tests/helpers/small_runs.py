"""The tiny preset and dataset of the tests, and what a run of them left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

from records.run_folder import RunFolder

# Dropout and augmentation are on, so that a resumed run has random numbers to get wrong. 300 images make 4 steps an epoch.
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
"""
TRAIN_PER_CLASS, TEST_PER_CLASS = 30, 7
EPOCHS, STEPS_PER_EPOCH = 12, 4  # what TINY and the number of images come to
STOPPED = 75  # exit code of a run that was told to stop, and saved


# --- what a run left behind ----------------------------------------------------------------------------------------
# Bit-identical means: the bytes of weights.safetensors, and every number of metrics.jsonl that is not a time.


def results(record: RunFolder) -> list[dict]:
    """The lines of metrics.jsonl without what a clock measured."""
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
