"""What tests share: a small drawn dataset, a tiny network's preset, and one run that was never interrupted."""

from __future__ import annotations

from pathlib import Path

import programs
import pytest

from prepare_dataset import prepare
from run_record import RunRecord

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


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A prepared dataset of 10 classes: 300 training and 70 test images of 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    prepare(folder, dataset="shapes", workers=1, shapes={"side": 32, "train_per_class": TRAIN_PER_CLASS, "test_per_class": TEST_PER_CLASS})
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A preset of a network that trains in seconds."""
    path = tmp_path_factory.mktemp("presets") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """The folder of run folders."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def training(shapes, tiny, runs) -> list:
    """The arguments of train.py that every run of the tests has."""
    return ["--preset", tiny, "--data-dir", shapes, "--runs-dir", runs]


@pytest.fixture(scope="session")
def unbroken(training, runs) -> RunRecord:
    """A finished run of all epochs, in one process, which nothing disturbed. Not to be changed: copy it."""
    programs.run("train.py", *training, "--name", "unbroken")
    return RunRecord(runs / "unbroken")
