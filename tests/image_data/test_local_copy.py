"""--stage-to (copies of datasets on a local disk) and the fixed batches of --synthetic.

Run: python -m pytest tests/image_data/test_local_copy.py
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from common.errors import DatasetError, StoppedError
from common.stop_signal import StopSignal
from config.settings import AugmentationSettings
from dali_pipeline import Batches, Synthetic
from image_data import local_copy
from image_data.dataset import Dataset
from image_data.local_copy import stage


@pytest.fixture
def dataset(shapes) -> Dataset:
    return Dataset.open(shapes)


def all_images(dataset: Dataset, source: str) -> torch.Tensor:
    return torch.cat([images for images, _ in Batches(dataset, "test", 10, source=source).epoch()])


@pytest.mark.parametrize(("files", "source"), [(False, "resident"), (True, "files")])
def test_the_copy_gives_the_same_images(dataset, tmp_path, files, source):
    staged = stage(dataset, tmp_path, files=files)
    assert tmp_path in staged.folder.parents and staged.fingerprint == dataset.fingerprint
    assert torch.equal(all_images(staged, source), all_images(dataset, source))
    assert staged.root.exists() and (not files or tmp_path in staged.root.parents)


def test_an_interrupted_copy_is_completed(dataset, tmp_path):
    """Intact files are kept; missing and short ones are copied again. The copy counts only when it is complete."""
    staged = stage(dataset, tmp_path, files=True)
    paths = [staged.root / path for path in staged.splits["train"].paths[:3]]
    (staged.folder / "dataset.json").unlink()
    paths[0].unlink()
    paths[1].write_bytes(b"half")
    untouched = paths[2].stat().st_mtime_ns
    assert not Dataset.is_prepared(staged.folder)
    again = stage(dataset, tmp_path, files=True)
    assert torch.equal(all_images(again, "files"), all_images(dataset, "files"))
    assert paths[0].is_file() and paths[1].stat().st_size > 4 and paths[2].stat().st_mtime_ns == untouched


def test_the_processes_of_a_host_make_one_copy(dataset, tmp_path, monkeypatch):
    copied = []
    original = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda a, b: copied.append(a) or original(a, b))
    with ThreadPoolExecutor(4) as pool:
        staged = list(pool.map(lambda _: stage(dataset, tmp_path, files=False), range(4)))
    assert len({s.folder for s in staged}) == 1 and len(copied) == len(set(copied)) == 5


def test_a_stop_ends_the_copy_soon(dataset, tmp_path, monkeypatch, signals):
    StopSignal()
    copied, original = [], shutil.copyfile

    def slow(source, copy):
        copied.append(copy)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        return original(source, copy)

    monkeypatch.setattr(local_copy, "COPY_THREADS", 1)
    monkeypatch.setattr(local_copy.shutil, "copyfile", slow)
    with pytest.raises(StoppedError, match="stopped while staging; the same command starts again"):
        stage(dataset, tmp_path, files=True)
    assert len(copied) <= 3


def test_errors_of_staging_name_the_cause(dataset, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 0))
    with pytest.raises(DatasetError, match="0.0 GiB are free. Choose another --stage-to"):
        stage(dataset, tmp_path, files=False)
    monkeypatch.undo()
    shutil.copytree(dataset.folder, tmp_path / "broken")
    broken = Dataset.open(tmp_path / "broken")
    broken.splits["train"].packed.unlink()
    with pytest.raises(DatasetError, match="cannot stage .*broken"):
        stage(broken, tmp_path / "copies", files=False)
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="cannot stage .* Choose another --stage-to, or omit it"):
        stage(dataset, tmp_path / "file" / "below", files=False)
    copy = stage(dataset, tmp_path, files=False)
    copy.splits["test"].packed.unlink()
    with pytest.raises(DatasetError, match=f"^the copy {copy.folder} is damaged. Delete it and start again$"):
        stage(dataset, tmp_path, files=False)


def test_synthetic_batches_have_the_shape_of_the_real_ones(dataset):
    real = Batches(dataset, "train", 50, augmentation=AugmentationSettings())
    fixed = Synthetic(real)
    (images, labels), expected = next(iter(fixed.epoch(0))), next(iter(real.epoch(0)))
    assert images.shape == expected[0].shape and labels.dtype == expected[1].dtype and len(fixed) == len(real)
    assert all(batch[0] is images for batch in fixed.epoch(1, 2, 4)) and np.isclose(fixed.wait_seconds, 0)
