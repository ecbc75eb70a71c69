"""prepare_dataset.py: the same files from the same images, and one clear sentence for everything that is wrong with them.

    pytest tests/test_prepare_dataset.py            no network, no GPU, a few seconds
    pytest tests/test_prepare_dataset.py -m slow    the real CIFAR-100 archive, when it lies in ../shared/data or $CIFAR100_ZIP
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dataset_sources
from dataset import Dataset
from dataset_checks import looks_like_jpeg
from dataset_shapes import SHAPES, draw
from prepare_dataset import PrepareError, main, prepare

REPOSITORY = Path(__file__).resolve().parent.parent
REAL_ARCHIVE = Path(os.environ.get("CIFAR100_ZIP", REPOSITORY.parent / "shared" / "data" / "cifar100.zip"))
WRITTEN = ("dataset.json", "labels.txt", "training_file_list.txt", "test_file_list.txt", "packed/train.npy", "packed/test.npy")


def noise(seed: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def tree_files(classes=("cat", "big dog"), train=3, test=2) -> dict[str, np.ndarray]:
    """Relative path -> pixels; all images differ."""
    names = [f"{split}/{name}/image {i}.png" for split, count in (("train", train), ("test", test))
             for name in classes for i in range(count)]
    return {name: noise(seed) for seed, name in enumerate(names)}


@pytest.fixture
def tree(tmp_path) -> Path:
    for name, pixels in tree_files().items():
        save(tmp_path / "tree" / name, pixels)
    return tmp_path / "tree"


@pytest.fixture
def zipped(tree, tmp_path) -> Path:
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as file:
        for path in sorted(tree.rglob("*.png")):
            file.write(path, f"pets/{path.relative_to(tree)}")
    return tmp_path / "pets.zip"


def written(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in WRITTEN if (folder / name).exists()}


def refusal(capsys, *arguments: object) -> str:
    """The sentence with which the command refuses; nothing else on stderr may look like a traceback."""
    assert main([str(argument) for argument in arguments]) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return next(line for line in message.splitlines() if line.startswith("error: "))


# ---- what is written ----

def test_lists_labels_and_pixels(tree, tmp_path):
    ready = prepare(tmp_path / "out", root=tree)
    assert (tmp_path / "out/labels.txt").read_text() == "big dog\ncat\n"
    assert (tmp_path / "out/test_file_list.txt").read_text() == (
        "test/big dog/image 0.png\t0\ntest/big dog/image 1.png\t0\ntest/cat/image 0.png\t1\ntest/cat/image 1.png\t1\n")
    for split in ready.splits.values():
        for path, pixels in zip(split.paths, split.pixels(), strict=True):
            assert np.array_equal(pixels, tree_files()[path])
            assert (ready.root / path).is_file()
    facts = json.loads((tmp_path / "out/dataset.json").read_text())
    assert (facts["num_classes"], facts["num_images"], facts["image_side"], facts["root"]) == (2, {"train": 6, "test": 4}, 16, "../tree")


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
    assert "already prepared" in said and "2 classes, 6 training and 4 test images" in said and "--force to redo" in said
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


# ---- images that are converted, varied or broken ----

def png_16_bit(value: int, color_type: int, channels: int) -> bytes:
    """A PNG of 16 x 16 pixels with 16 bits a channel, all of them `value`."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + struct.pack(">H", value) * 16 * channels) * 16
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, color_type, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("color_type, channels", [(0, 1), (2, 3), (6, 4)])
def test_16_bit_images_keep_the_high_byte(tree, capsys, color_type, channels):
    (tree / "train/big dog/a.png").write_bytes(png_16_bit(0x12F0, color_type, channels))
    assert np.all(prepare(root=tree).splits["train"].pixels()[0] == 0x12)
    assert "1 16-bit image converted to 8-bit RGB (the high byte is kept)" in capsys.readouterr().err


@pytest.mark.parametrize("mode, said", [("RGBA", "1 RGBA image converted to 8-bit RGB (alpha is dropped)"),
                                        ("LA", "1 grey with alpha image converted to 8-bit RGB (alpha is dropped)"),
                                        ("P", "1 palette image converted to 8-bit RGB"), ("L", "1 greyscale image converted to 8-bit RGB")])
def test_other_modes_are_converted_and_said(tree, capsys, mode, said):
    image = Image.fromarray(noise(50)).convert("RGBA" if mode == "RGBA" else mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(7)
    image.save(tree / "train/big dog/a.png")
    expected = np.asarray(Image.open(tree / "train/big dog/a.png").convert("RGB"))
    assert np.array_equal(prepare(root=tree).splits["train"].pixels()[0], expected)
    assert said in capsys.readouterr().err


def test_mixed_sizes_are_not_packed(tree, capsys):
    save(tree / "train/cat/wide.png", noise(60, 40)[:20])
    ready = prepare(root=tree)
    facts = json.loads((tree / "dataset.json").read_text())
    assert ready.image_side is None and ready.splits["train"].packed is None and not (tree / "packed").exists()
    assert (facts["smallest_image"], facts["largest_image"]) == ([16, 16], [40, 20])
    assert "image sizes vary from 16x16 to 40x20: they are not packed, training will read the files" in capsys.readouterr().err


def test_pack_limit(tree, capsys):
    ready = prepare(root=tree, pack_limit_gib=0)
    assert ready.image_side == 16 and ready.splits["train"].packed is None
    assert "more than --pack-limit-gib 0" in capsys.readouterr().err


def test_broken_images_are_refused_or_left_out(tree, capsys):
    (tree / "train/cat/empty.png").touch()
    (tree / "train/cat/text.png").write_text("no picture")
    whole = (tree / "train/big dog/image 1.png").read_bytes()
    (tree / "train/big dog/image 1.png").write_bytes(whole[:len(whole) // 2])
    message = refusal(capsys, "--root", tree)
    assert "3 image(s) cannot be decoded" in message and "--skip-broken" in message
    assert "train/cat/empty.png (empty file)" in message and "train/cat/text.png (not an image)" in message
    assert "train/big dog/image 1.png (" in message
    assert not (tree / "dataset.json").exists()
    ready = prepare(root=tree, skip_broken=True)
    assert "3 image(s) that cannot be decoded left out" in capsys.readouterr().err
    assert ready.splits["train"].paths == [
        f"train/{name}.png" for name in ("big dog/image 0", "big dog/image 2", "cat/image 0", "cat/image 1", "cat/image 2")]
    assert np.array_equal(ready.splits["train"].pixels()[1], tree_files()["train/big dog/image 2.png"])
    assert len(ready.splits["train"].pixels()) == 5


def test_a_class_that_is_wholly_broken_is_refused(tree, capsys):
    for path in (tree / "test/cat").iterdir():
        path.write_bytes(b"")
    assert "the test split has none of class 'cat'" in refusal(capsys, "--root", tree, "--skip-broken")


# ---- trees that are not a dataset ----

def test_lonely_classes_are_refused(tree, capsys):
    save(tree / "train/fox/a.png", noise(70))
    save(tree / "test/owl/a.png", noise(71))
    message = refusal(capsys, "--root", tree)
    assert "only in train: 'fox'" in message and "only in test: 'owl'" in message


def test_no_images_names_the_layout(tmp_path, capsys):
    assert "holds no train folder, so 0 images were found" in refusal(capsys, "--root", tmp_path)
    for split in ("train", "test"):
        (tmp_path / "inner" / split / "cat").mkdir(parents=True)
    assert f"did you mean {tmp_path}/inner" in refusal(capsys, "--root", tmp_path)
    message = refusal(capsys, "--root", tmp_path / "inner")
    assert "holds 0 images in class folders" in message and "train/<class>/*.png" in message


@pytest.mark.parametrize("name", ["a\tb.png", "a\nb.png", "a\u2028b.png", "a\udcffb.png"])
def test_names_that_would_break_a_list_are_refused(tree, capsys, name):
    save(tree / "train/cat/plain.png", noise(80))
    (tree / "train/cat/plain.png").rename(tree / "train/cat" / name)
    assert ascii(name)[1:-1] in refusal(capsys, "--root", tree)


def test_strays_and_empty_folders_are_named_and_system_files_are_not(tree, capsys):
    (tree / "train/cat/notes.txt").touch()
    (tree / "train/cat/.DS_Store").touch()
    (tree / "train/cat/Thumbs.db").touch()
    (tree / "train/__MACOSX/cat").mkdir(parents=True)
    (tree / "train/nothing").mkdir()
    save(tree / "train/loose.png", noise(90))
    assert len(prepare(root=tree).splits["train"]) == 6
    said = capsys.readouterr().err
    assert "1 file(s) that are not images left out: 'train/cat/notes.txt'" in said
    assert "1 class folder(s) without images left out: 'train/nothing'" in said
    assert "1 image(s) directly in train/, outside any class folder left out: 'train/loose.png'" in said
    assert not any(name in said for name in (".DS_Store", "Thumbs.db", "__MACOSX"))


def test_duplicates_across_the_splits_are_named(tree, capsys):
    save(tree / "test/cat/copy.png", tree_files()["train/cat/image 1.png"], compress_level=0)
    prepare(root=tree)
    assert ("1 of 5 test images are exact duplicates of training images: 'train/cat/image 1.png' = 'test/cat/copy.png'"
            in capsys.readouterr().err)


@pytest.mark.parametrize("stored", ["as drawn", "PNG after JPEG", "JPEG"])
def test_cifar_sized_images_that_went_through_jpeg_are_named(tmp_path, capsys, stored):
    for split, count in (("train", 20), ("test", 1)):
        for name in ("circle", "star"):
            for i in range(count):
                pixels, file = draw(name, 32, [7, split == "test", i]), io.BytesIO()
                Image.fromarray(pixels).save(file, "JPEG", quality=90)
                path = tmp_path / split / name / f"{i}.png"
                save(path, np.asarray(Image.open(file)) if stored == "PNG after JPEG" else pixels)
                if stored == "JPEG":
                    path.write_bytes(file.getvalue())
    prepare(root=tmp_path)
    assert ("a CIFAR recompressed as JPEG costs 2 to 3 points" in capsys.readouterr().err) == (stored != "as drawn")


# ---- archives ----

@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_archive_gives_the_same_as_the_tree(tree, zipped, tmp_path, kind):
    archive = zipped
    if kind != "zip":
        archive = tmp_path / f"pets.{kind}"
        with tarfile.open(archive, "w:gz" if kind == "tar.gz" else "w") as file:
            file.add(tree, "some/where/pets")
    ready = prepare(tmp_path / "out", archive=archive)
    assert ready.root == tmp_path / "out/images" and not (tmp_path / "out/.partial").exists()
    assert ready.fingerprint == prepare(tmp_path / "direct", root=tree).fingerprint


def member(name: str, **attributes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize("info, said", [
    (member("train/../../evil.png"), "leads outside"), (member("/tmp/evil.png"), "leads outside"),
    (member("train/cat/evil.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "symbolic link"),
    (member("train/cat/evil.png", type=tarfile.LNKTYPE, linkname="../../x"), "hard link"),
    (member("train/cat/evil.png", type=tarfile.CHRTYPE), "device")])
def test_tar_members_that_could_escape_are_refused(tree, tmp_path, capsys, info, said):
    with tarfile.open(tmp_path / "bad.tar", "w") as file:
        file.add(tree, "pets")
        file.addfile(info)
    message = refusal(capsys, "--archive", tmp_path / "bad.tar", "--data-dir", tmp_path / "out")
    assert info.name in message and said in message
    assert not list(tmp_path.rglob("evil.png")) and not (tmp_path / "out/images").exists()


@pytest.mark.parametrize("name", ["../evil.png", "pets\\..\\..\\evil.png", "/evil.png", "C:\\evil.png", "link"])
def test_zip_members_that_could_escape_are_refused(zipped, tmp_path, capsys, name):
    with zipfile.ZipFile(zipped, "a") as file:
        info = zipfile.ZipInfo("x")
        info.filename = name
        info.external_attr = (0o120777 if name == "link" else 0o100644) << 16
        file.writestr(info, "/etc/passwd")
    message = refusal(capsys, "--archive", zipped, "--data-dir", tmp_path / "out")
    assert name in message and ("symbolic link" if name == "link" else "leads outside") in message
    assert not list(tmp_path.rglob("evil.png"))


def test_a_damaged_archive_leaves_nothing(zipped, tmp_path, capsys):
    damaged = bytearray(zipped.read_bytes())
    damaged[len(damaged) // 3] ^= 255
    zipped.write_bytes(damaged)
    assert "is damaged or cut short" in refusal(capsys, "--archive", zipped, "--data-dir", tmp_path / "out")
    zipped.write_bytes(damaged[:1000])
    assert "neither a zip nor a tar archive" in refusal(capsys, "--archive", zipped, "--data-dir", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".prepare.lock"]


def test_a_killed_run_leaves_no_dataset_and_the_next_one_works(zipped, tmp_path):
    script = ("import os, signal, dataset_archives, prepare_dataset\n"
              "def stop(items, total, what, weigh=None):\n"
              "    for number, item in enumerate(items):\n"
              "        yield item\n"
              "        if number == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
              "dataset_archives.progress = stop\n"
              f"prepare_dataset.prepare({str(tmp_path / 'out')!r}, archive={str(zipped)!r})\n")
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY)
    assert result.returncode == -signal.SIGKILL
    assert not Dataset.is_prepared(tmp_path / "out") and not (tmp_path / "out/images").exists()
    assert len(prepare(tmp_path / "out", archive=zipped).splits["train"]) == 6
    assert not (tmp_path / "out/.partial").exists()


def test_a_folder_of_the_user_is_not_replaced(zipped, tmp_path, capsys):
    (tmp_path / "out/images").mkdir(parents=True)
    (tmp_path / "out/images/holiday.png").touch()
    assert "is in the way" in refusal(capsys, "--archive", zipped, "--data-dir", tmp_path / "out")
    assert (tmp_path / "out/images/holiday.png").exists()


def test_archive_without_a_tree(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    assert "holds no train/ folder" in refusal(capsys, "--archive", tmp_path / "x.zip", "--data-dir", tmp_path / "out")
    assert "does not exist" in refusal(capsys, "--archive", tmp_path / "y.zip", "--data-dir", tmp_path / "out2")


# ---- the original CIFAR archives ----

def python_archive(path: Path, which: int, extra: dict[str, bytes] | None = None) -> dict[str, np.ndarray]:
    """A miniature cifar-<which>-python.tar.gz, pickled as the original is (protocol 2, str keys). Returns path -> pixels."""
    folder = {10: "cifar-10-batches-py", 100: "cifar-100-python"}[which]
    batches = {10: {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}, 100: {"train": ["train"], "test": ["test"]}}
    classes = ["plane", "apple_tree"]
    key, names_key, meta = ("labels", "label_names", "batches.meta") if which == 10 else ("fine_labels", "fine_label_names", "meta")
    files, images, seed = {meta: pickle.dumps({names_key: classes, "num_vis": 3072}, protocol=2)}, {}, 0
    for split, names in batches[which].items():
        for name in names:
            pixels = np.stack([noise(seed + i, 32) for i in range(4)])
            filenames = [f"{'st._david' if label else 'p'}'s_s_{seed + i:06d}.png" for i, label in enumerate((0, 1, 0, 1))]
            images |= {f"{split}/{classes[i % 2]}/{filenames[i]}": pixels[i] for i in range(4)}
            rows = pixels.transpose(0, 3, 1, 2).reshape(4, 3072)
            files[name] = pickle.dumps({"data": rows, key: [0, 1, 0, 1], "filenames": filenames}, protocol=2)
            seed += 4
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (files | (extra or {})).items():
            archive.addfile(member(f"{folder}/{name}", size=len(data)), io.BytesIO(data))
    return images


@pytest.mark.parametrize("which", [10, 100])
def test_python_archive(tmp_path, which):
    images = python_archive(tmp_path / "cifar.tar.gz", which)
    ready = prepare(tmp_path / "out", archive=tmp_path / "cifar.tar.gz")
    assert ready.classes == ["apple_tree", "plane"]
    assert {path for split in ready.splits.values() for path in split.paths} == set(images)
    for split in ready.splits.values():
        for path, label, pixels in zip(split.paths, split.labels, split.pixels(), strict=True):
            assert np.array_equal(pixels, images[path]) and path.split("/")[1] == ready.classes[label]


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, capsys):
    python_archive(tmp_path / "cifar.tar.gz", 100, {"train": pickle.dumps({"data": Malicious(tmp_path / "owned")}, protocol=2)})
    message = refusal(capsys, "--archive", tmp_path / "cifar.tar.gz", "--data-dir", tmp_path / "out")
    assert "is refused" in message and "cifar-100-python/train" in message and "mkdir" in message
    assert not (tmp_path / "owned").exists()


def test_python_archive_with_hostile_names_or_holes(tmp_path, capsys):
    meta = pickle.dumps({"fine_label_names": ["../../evil", "b"]}, protocol=2)
    python_archive(tmp_path / "cifar.tar.gz", 100, {"meta": meta})
    assert "unsafe name" in refusal(capsys, "--archive", tmp_path / "cifar.tar.gz", "--data-dir", tmp_path / "out")
    python_archive(tmp_path / "cifar.tar.gz", 100, {"train": pickle.dumps({}, protocol=2)})
    assert "does not hold what CIFAR holds" in refusal(capsys, "--archive", tmp_path / "cifar.tar.gz", "--data-dir", tmp_path / "out")


# ---- downloads ----

def offline(*_, **__):
    raise OSError("Network is unreachable")


@pytest.mark.parametrize("dataset", ["cifar100", "cifar10"])
def test_without_a_network_one_sentence_says_what_to_do(tmp_path, capsys, monkeypatch, dataset):
    monkeypatch.setattr(dataset_sources, "_from_drive", offline)
    monkeypatch.setattr(dataset_sources, "_download", offline)
    message = refusal(capsys, "--dataset", dataset, "--data-dir", tmp_path / "out")
    assert "Network is unreachable" in message and "--archive FILE" in message and "--dataset shapes" in message


def test_drive_file_is_used_only_when_whole(zipped, tmp_path, monkeypatch):
    class Gdown:
        content = zipped.read_bytes()

        @classmethod
        def download(cls, output, **_):
            Path(output).write_bytes(cls.content)

    monkeypatch.setitem(sys.modules, "gdown", Gdown)
    monkeypatch.setattr(dataset_sources, "_download", offline)
    whole, Gdown.content = Gdown.content, b"<html>quota exceeded</html>"
    with pytest.raises(PrepareError):
        prepare(tmp_path / "out", dataset="cifar100")
    assert not list((tmp_path / "out").glob("cifar100.zip*"))
    Gdown.content = whole
    assert len(prepare(tmp_path / "out", dataset="cifar100").splits["train"]) == 6
    monkeypatch.setitem(sys.modules, "gdown", None)  # the archive stays: no network is needed again
    assert len(prepare(tmp_path / "out", dataset="cifar100", force=True).splits["train"]) == 6


def test_toronto_file_is_resumed_and_used_only_when_its_checksum_is_right(tmp_path, monkeypatch):
    python_archive(tmp_path / "mini.tar.gz", 10)
    content, asked = (tmp_path / "mini.tar.gz").read_bytes(), []
    (tmp_path / "out").mkdir()
    (tmp_path / "out/cifar-10-python.tar.gz.part").write_bytes(content[:700])

    class Response(io.BytesIO):
        status = 206
        headers = {"Content-Length": str(len(content) - 700)}

    def urlopen(request, timeout):
        asked.append(request.get_header("Range"))
        return Response(content[700:])

    monkeypatch.setattr(dataset_sources.urllib.request, "urlopen", urlopen)
    with pytest.raises(PrepareError, match="arrived damaged"):
        prepare(tmp_path / "out", dataset="cifar10")
    assert asked == ["bytes=700-"] and not list((tmp_path / "out").glob("cifar-10*"))
    (tmp_path / "out/cifar-10-python.tar.gz.part").write_bytes(content[:700])
    monkeypatch.setitem(dataset_sources.TORONTO_MD5, "cifar-10-python.tar.gz", dataset_sources._md5(tmp_path / "mini.tar.gz"))
    assert len(prepare(tmp_path / "out", dataset="cifar10").splits["train"]) == 20


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
    script = ("import os, signal, dataset_decode\n"
              "with dataset_decode.decoder(2) as decode:\n"
              "    print(list(decode(abs, [1, 2, 3])), flush=True)\n"
              "    os.kill(os.getpid(), signal.SIGKILL)\n")
    run = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert run.communicate(timeout=20)[0] == b"[1, 2, 3]\n"  # returns only when every process that holds the pipe is gone
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise


def test_two_runs_at_once_make_one_dataset(zipped, tmp_path):
    command = [sys.executable, REPOSITORY / "prepare_dataset.py", "--archive", zipped, "--data-dir", tmp_path / "out"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(run.communicate()[0].split(" ")[0] for run in runs)
    assert said == ["already", "prepared"] and [run.returncode for run in runs] == [0, 0]


def test_help_is_quick(tmp_path):
    started = time.perf_counter()
    shown = subprocess.run([sys.executable, REPOSITORY / "prepare_dataset.py", "--help"], capture_output=True, text=True).stdout
    assert "example: python prepare_dataset.py" in shown and "default: 8" in shown
    assert time.perf_counter() - started < 5  # 0.3 s on an idle machine


@pytest.mark.slow
@pytest.mark.skipif(not REAL_ARCHIVE.is_file(), reason="the real CIFAR-100 archive is not here")
def test_the_real_cifar100(tmp_path, capsys):
    ready = prepare(tmp_path, archive=REAL_ARCHIVE)
    assert len(ready.classes) == 100 and [len(ready.splits[name]) for name in ("train", "test")] == [50_000, 10_000]
    pixels = ready.splits["train"].pixels()
    assert np.allclose(ready.mean, pixels.mean(axis=(0, 1, 2), dtype=np.float64) / 255, atol=1e-6)
    assert np.allclose(ready.mean, (0.5071, 0.4865, 0.4409), atol=1e-4) and np.allclose(ready.std, (0.2673, 0.2564, 0.2762), atol=1e-4)
    assert "JPEG" not in capsys.readouterr().err
    for quality in (75, 90):
        files = [io.BytesIO() for _ in range(300)]
        for file, image in zip(files, pixels[::160], strict=False):
            Image.fromarray(image).save(file, "JPEG", quality=quality)
        assert looks_like_jpeg(np.stack([np.asarray(Image.open(file)) for file in files]))
