"""prepare_dataset.py: reproducible files, the drawn dataset, and the command (see also tests/image_data).

pytest tests/test_prepare_dataset.py            no network, no GPU, a few seconds
pytest tests/test_prepare_dataset.py -m slow    the real CIFAR-100 archive: data/cifar100/cifar100.zip or $CIFAR100_ZIP
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import WRITTEN, noise, refusal, save, tree_files, written

from common.errors import DatasetError
from common.paths import DATA
from dali_pipeline import Batches
from image_data.dataset import Dataset
from image_data.preparation.downloads import CIFAR100_SHA256
from image_data.preparation.drawn_shapes import SHAPES
from image_data.preparation.image_tree import PrepareError
from image_data.preparation.jpeg_traces import looks_like_jpeg
from image_data.preparation.prepare import prepare
from prepare_dataset import main

REAL_ARCHIVE = Path(os.environ.get("CIFAR100_ZIP", DATA / "cifar100" / "cifar100.zip"))


# ---- what is written ----


def test_lists_labels_and_pixels(tree, tmp_path):
    ready = prepare(tmp_path / "out", root=tree)
    assert (tmp_path / "out/labels.txt").read_text() == "big dog\ncat\n"
    assert (tmp_path / "out/test_file_list.txt").read_text() == (
        "test/big dog/image 0.png\t0\ntest/big dog/image 1.png\t0\ntest/cat/image 0.png\t1\ntest/cat/image 1.png\t1\n"
    )
    for split in ready.splits.values():
        for path, pixels in zip(split.paths, split.pixels(), strict=True):
            assert np.array_equal(pixels, tree_files()[path])
            assert (ready.root / path).is_file()
    facts = json.loads((tmp_path / "out/dataset.json").read_text())
    assert (facts["num_classes"], facts["num_images"], facts["image_side"], facts["root"]) == (
        2,
        {"train": 6, "test": 4},
        16,
        "../tree",
    )


def test_mean_and_std_are_those_of_the_training_pixels(tree, tmp_path):
    ready = prepare(tmp_path / "out", root=tree)
    pixels = np.stack([image for name, image in tree_files().items() if name.startswith("train")]) / 255
    assert np.allclose(ready.mean, pixels.mean(axis=(0, 1, 2)), atol=1e-6)
    assert np.allclose(ready.std, pixels.std(axis=(0, 1, 2)), atol=1e-6)


def test_files_are_byte_identical_for_any_workers_place_and_creation_order(tmp_path):
    files, results = tree_files(train=150), []
    for folder, workers in (("a", 1), ("elsewhere/b", 2)):
        for name in random.Random(folder).sample(list(files), len(files)):
            save(tmp_path / folder / name, files[name])
        prepare(tmp_path / folder, root=tmp_path / folder, workers=workers)
        results.append(written(tmp_path / folder))
    assert len(results[0]) == len(WRITTEN) and results[0] == results[1]
    assert json.loads(results[0]["dataset.json"])["root"] == "."


def test_fingerprint_sees_pixels_and_labels(tree, tmp_path):
    before = prepare(tmp_path / "a", root=tree).fingerprint
    changed = noise(0)
    changed[3, 3, 0] ^= 1
    save(tree / "train/cat/image 0.png", changed)
    pixels = prepare(tmp_path / "b", root=tree).fingerprint
    for split in ("train", "test"):
        (tree / split / "cat").rename(tree / split / "zebra")
    assert len({before, pixels, prepare(tmp_path / "c", root=tree).fingerprint}) == 3


def test_validation_split_holds_the_images_of_its_paths(tmp_path):
    for name, pixels in tree_files(train=10).items():
        save(tmp_path / name, pixels)
    parts = prepare(tmp_path).hold_out(0.2).splits
    assert {name: len(split) for name, split in parts.items()} == {"train": 16, "validation": 4, "test": 4}
    held = parts["validation"]
    assert np.array_equal(held.pixels()[held.rows[0]], tree_files(train=10)[held.paths[0]])


def test_second_call_returns_at_once_and_force_redoes(tree, tmp_path, capsys):
    prepare(tmp_path / "out", root=tree)
    save(tree / "train/cat/new.png", noise(99))
    assert len(prepare(tmp_path / "out", root=tree).splits["train"]) == 6
    said = capsys.readouterr().out
    assert (
        "already prepared" in said
        and "2 classes, 6 training and 4 test images" in said
        and "--force prepares again" in said
    )
    assert len(prepare(tmp_path / "out", root=tree, force=True).splits["train"]) == 7


@pytest.mark.parametrize("damage", [b'{"num_classes": 2, "mea', b"[]", "fingerprint", "root", "mean"])
def test_a_damaged_description_is_one_sentence_and_force_restores_it(tree, capsys, damage):
    prepare(tree)
    intact = (tree / "dataset.json").read_bytes()
    if isinstance(damage, str):
        facts = json.loads(intact)
        del facts[damage]
        damage = json.dumps(facts).encode()
    (tree / "dataset.json").write_bytes(damage)
    message = refusal(capsys, "--data-dir", tree)
    assert f"{tree} is damaged" in message and f"Run: python prepare_dataset.py --data-dir {tree} --force" in message
    assert main(["--data-dir", str(tree), "--force"]) == 0
    assert (tree / "dataset.json").read_bytes() == intact


def test_a_constant_channel_is_named_and_normalized_by_1(tree, tmp_path, capsys):
    for path in tree.rglob("*.png"):
        pixels = np.asarray(Image.open(path)).copy()
        pixels[..., 1] = 51
        Image.fromarray(pixels).save(path)
    ready = prepare(tmp_path / "out", root=tree)
    assert "the green channel is constant (0.2 in all training images)" in capsys.readouterr().err
    assert ready.mean[1] == 0.2 and ready.std[1] == 1 and 0 < ready.std[0] < 1
    images, _ = next(iter(Batches(ready, "test", 4).epoch()))
    assert images.isfinite().all() and images[:, 1].abs().max() < 1e-6


def test_a_tilde_is_the_home_folder(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["--root=~/tree", "--data-dir=~/out"]) == 0
    assert (tmp_path / "out/dataset.json").is_file() and not (tmp_path / "~").exists()
    assert prepare("~/out").folder == tmp_path / "out"


def test_a_read_only_tree_is_prepared_elsewhere(tree, capsys, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(tree / ".prepare.lock"))

    monkeypatch.setattr("image_data.preparation.prepare._created_and_locked", read_only)
    monkeypatch.setattr(os, "access", lambda *_: False)
    spaced = tree.rename(tree.with_name("my tree"))
    message = refusal(capsys, "--root", spaced)
    assert "read-only" in message and f"python prepare_dataset.py --root '{spaced}' --data-dir NEW" in message


def test_an_archive_that_cannot_be_read_is_no_read_only_folder(tmp_path, zipped, capsys, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(zipped))

    monkeypatch.setattr("image_data.preparation.prepare._created_and_locked", denied)
    message = refusal(capsys, "--archive", zipped, "--data-dir", tmp_path / "new" / "er")
    assert "Check permissions" in message and "read-only" not in message


def test_an_empty_file_of_pixels_is_named(tree):
    dataset = prepare(tree)
    dataset.splits["train"].packed.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"train.npy is damaged .*Run: python prepare_dataset.py"):
        dataset.splits["train"].pixels()


def test_a_tree_that_lies_in_the_data_dir_needs_no_download(tree, capsys):
    assert len(prepare(tree).splits["train"]) == 6
    assert f"using the images in {tree}/train" in capsys.readouterr().out


def test_nested_classes_are_named_by_their_path(tmp_path):
    for name, pixels in tree_files(classes=("animals/cat", "animals/dog", "car")).items():
        save(tmp_path / name, pixels)
    assert prepare(tmp_path).classes == ["animals/cat", "animals/dog", "car"]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_val_replaces_test(tree, capsys, name):
    (tree / "test").rename(tree / name)
    ready = prepare(root=tree)
    assert ready.splits["test"].paths[0] == f"{name}/big dog/image 0.png"
    assert f"'{name}' is used as the test split" in capsys.readouterr().err


# ---- shapes, and the command ----


def test_shapes_are_the_same_everywhere_and_all_differ(tmp_path):
    ready = prepare(tmp_path, dataset="shapes", shapes={"side": 16, "train_per_class": 3, "test_per_class": 2})
    assert ready.classes == sorted(SHAPES) and len(ready.splits["train"]) == 30 and ready.image_side == 16
    assert ready.fingerprint == "sha256:82b854ce42c0599c82def05a2556992bff76bc20fb50187f5d6fd15072c6f425"
    assert len({pixels.tobytes() for split in ready.splits.values() for pixels in split.pixels()}) == 50


def test_misuse_is_one_sentence(tmp_path, capsys):
    with pytest.raises(PrepareError, match="only one of"):
        prepare(tmp_path, dataset="shapes", root=tmp_path)
    with pytest.raises(PrepareError, match=r"unknown dataset 'imagenet' \(known: cifar100, cifar10, shapes\)"):
        prepare(tmp_path, dataset="imagenet")
    with pytest.raises(PrepareError, match="train_per_class"):
        prepare(tmp_path, dataset="shapes", shapes={"hue": 3})
    for workers in (0, 10**20):
        assert "--workers must lie between 1 and 1024" in refusal(capsys, "--workers", workers, "--data-dir", tmp_path)
    assert "is not a file. For a folder use prepare_dataset.py --root" in refusal(
        capsys, "--archive", tmp_path, "--data-dir", tmp_path / "new"
    )
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "under"):
        message = refusal(capsys, "--dataset", "shapes", "--data-dir", folder)
        assert message == f"error: {tmp_path}/file is a file, not a folder. Choose another --data-dir"
    with pytest.raises(DatasetError, match="file is a file, not a folder. Give --data-dir the folder of a prepared"):
        Dataset.open(tmp_path / "file")
    assert "File name too long" in refusal(capsys, "--dataset", "shapes", "--data-dir", tmp_path / ("x" * 300))
    assert "--unpack-limit-gib must be > 0" in refusal(capsys, "--unpack-limit-gib", 0, "--data-dir", tmp_path)
    assert "--max-megapixels must be >= 0, got nan" in refusal(
        capsys, "--max-megapixels", "nan", "--data-dir", tmp_path
    )


@pytest.mark.parametrize("name", [".zip", "..zip", "a\nb.zip"])
def test_an_archive_whose_name_gives_no_folder_name_needs_a_data_dir(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    assert "gives no folder name. Add --data-dir DIR" in refusal(capsys, "--archive", name)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # not the folder of all datasets


def test_a_pipe_in_a_tree_is_named_and_not_read(tree, capsys):
    os.mkfifo(tree / "train/cat/pipe.png")
    assert "train/cat/pipe.png (not a regular file)" in refusal(capsys, "--root", tree, "--workers", 1)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_ARCHIVE.is_file(), reason="the real CIFAR-100 archive is not here")
def test_the_real_cifar100(tmp_path, capsys):
    assert hashlib.sha256(REAL_ARCHIVE.read_bytes()).hexdigest() == CIFAR100_SHA256
    ready = prepare(tmp_path, archive=REAL_ARCHIVE)
    assert len(ready.classes) == 100 and [len(ready.splits[name]) for name in ("train", "test")] == [50_000, 10_000]
    pixels = ready.splits["train"].pixels()
    assert np.allclose(ready.mean, pixels.mean(axis=(0, 1, 2), dtype=np.float64) / 255, atol=1e-6)
    assert np.allclose(ready.mean, (0.5071, 0.4865, 0.4409), atol=1e-4) and np.allclose(
        ready.std, (0.2673, 0.2564, 0.2762), atol=1e-4
    )
    assert "JPEG" not in capsys.readouterr().err
    for quality in (75, 90):
        files = [io.BytesIO() for _ in range(300)]
        for file, image in zip(files, pixels[::160], strict=False):
            Image.fromarray(image).save(file, "JPEG", quality=quality)
        assert looks_like_jpeg(np.stack([np.asarray(Image.open(file)) for file in files]))
