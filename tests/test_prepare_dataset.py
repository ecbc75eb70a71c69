"""prepare_dataset.py: the same files from the same images; the drawn dataset; the command. Archives and odd images: the files beside this.

pytest tests/test_prepare_dataset.py            no network, no GPU, a few seconds
pytest tests/test_prepare_dataset.py -m slow    the real CIFAR-100 archive, when it lies in ../shared/data or $CIFAR100_ZIP
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import WRITTEN, noise, refusal, save, tree_files, written

from common.paths import PROJECT
from image_data.preparation.drawn_shapes import SHAPES
from image_data.preparation.image_tree import PrepareError, looks_like_jpeg
from image_data.preparation.prepare import prepare

REAL_ARCHIVE = Path(os.environ.get("CIFAR100_ZIP", PROJECT.parent / "shared" / "data" / "cifar100.zip"))


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


def test_round_trip_with_a_held_out_part(tmp_path):
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
        "already prepared" in said and "2 classes, 6 training and 4 test images" in said and "--force to redo" in said
    )
    assert len(prepare(tmp_path / "out", root=tree, force=True).splits["train"]) == 7


def test_force_that_fails_keeps_what_was_prepared(zipped, tmp_path):
    prepare(tmp_path / "out", archive=zipped)
    before = written(tmp_path / "out")
    (tmp_path / "bad.zip").write_bytes(zipped.read_bytes()[:-500])
    with pytest.raises(PrepareError):
        prepare(tmp_path / "out", archive=tmp_path / "bad.zip", force=True)
    assert written(tmp_path / "out") == before
    assert len(list((tmp_path / "out/images").rglob("*.png"))) == 10


def test_a_tree_that_lies_in_the_data_dir_needs_no_download(tree, capsys):
    assert len(prepare(tree).splits["train"]) == 6
    assert f"using the images that lie in {tree}/train" in capsys.readouterr().out


def test_nested_classes_are_named_by_their_path(tmp_path):
    for name, pixels in tree_files(classes=("animals/cat", "animals/dog", "car")).items():
        save(tmp_path / name, pixels)
    assert prepare(tmp_path).classes == ["animals/cat", "animals/dog", "car"]


@pytest.mark.parametrize("name", ["val", "validation"])
def test_val_stands_in_for_test(tree, capsys, name):
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
    with pytest.raises(PrepareError, match="unknown dataset 'imagenet'; known are cifar100, cifar10, shapes"):
        prepare(tmp_path, dataset="imagenet")
    with pytest.raises(PrepareError, match="train_per_class"):
        prepare(tmp_path, dataset="shapes", shapes={"colour": 3})
    assert "--workers must be at least 1" in refusal(capsys, "--workers", 0, "--data-dir", tmp_path)
    (tmp_path / "file").touch()
    assert "cannot prepare" in refusal(capsys, "--dataset", "shapes", "--data-dir", tmp_path / "file" / "under")


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = (
        "import os, signal, dataset_decode\n"
        "with dataset_decode.decoder(2) as decode:\n"
        "    print(list(decode(abs, [1, 2, 3])), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert (
            run.communicate(timeout=20)[0] == b"[1, 2, 3]\n"
        )  # returns only when every process that holds the pipe is gone
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise


def test_two_runs_at_once_make_one_dataset(zipped, tmp_path):
    command = [sys.executable, PROJECT / "prepare_dataset.py", "--archive", zipped, "--data-dir", tmp_path / "out"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(run.communicate()[0].split(" ")[0] for run in runs)
    assert said == ["already", "prepared"] and [run.returncode for run in runs] == [0, 0]


@pytest.mark.slow
@pytest.mark.skipif(not REAL_ARCHIVE.is_file(), reason="the real CIFAR-100 archive is not here")
def test_the_real_cifar100(tmp_path, capsys):
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
