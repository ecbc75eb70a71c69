"""prepare_dataset.py on archives: intact, hostile, damaged and unsupported ones, the CIFAR files, and downloads."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import io
import lzma
import pickle
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from bomb import Bomb
from PIL import Image
from trees import member, python_archive, refusal, tree_files

from common.paths import PROJECT
from image_data.dataset import Dataset
from image_data.preparation import archives
from image_data.preparation import downloads as dataset_sources
from image_data.preparation.image_tree import PrepareError
from image_data.preparation.prepare import prepare

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


@pytest.mark.parametrize(
    "info, said",
    [
        (member("train/../../evil.png"), "leads outside"),
        (member("/tmp/evil.png"), "leads outside"),
        (member("train/cat/evil.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "symbolic link"),
        (member("train/cat/evil.png", type=tarfile.LNKTYPE, linkname="../../x"), "hard link"),
        (member("train/cat/evil.png", type=tarfile.CHRTYPE), "device"),
    ],
)
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
    assert "is the beginning of a zip archive" in refusal(capsys, "--archive", zipped, "--data-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("how", ["before a header", "in a header", "flipped bit", "hole", "before its end"])
def test_a_damaged_tar_is_not_taken_for_one_with_fewer_images(tree, tmp_path, capsys, kind, how):
    """tarfile ends its listing at each of these places without an error."""
    plain, archive = tmp_path / "plain.tar", tmp_path / f"pets.{kind}"
    with tarfile.open(plain, "w") as file:
        file.add(tree, "pets")
    with tarfile.open(plain) as file:
        last, end = file.getmembers()[-1].offset, file.offset
    data = bytearray(plain.read_bytes())
    if how == "flipped bit":
        data[last + 3] ^= 1
    elif how == "hole":
        data[last : last + 512] = bytes(512)
    else:
        del data[{"before a header": last, "in a header": last + 100, "before its end": end}[how] :]
    compress = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}[kind]
    archive.write_bytes(compress(bytes(data)))
    assert "is damaged or cut short" in refusal(capsys, "--archive", archive, "--data-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_every_byte_of_a_compressed_tar_is_checked(tree, tmp_path, capsys, kind):
    with tarfile.open(tmp_path / "pets.tar", f"w:{kind}") as file:  # type: ignore[call-overload]
        file.add(tree, "pets")
    intact = (tmp_path / "pets.tar").read_bytes()
    for damaged in (intact[: len(intact) // 2], intact[: len(intact) // 2] + b"x" + intact[len(intact) // 2 + 1 :]):
        (tmp_path / "pets.tar").write_bytes(damaged)
        message = refusal(capsys, "--archive", tmp_path / "pets.tar", "--data-dir", tmp_path / "out")
        assert "is damaged or cut short" in message or kind == "bz2" and "or it is cut short" in message  # one block


def test_damaged_data_of_bzip2_are_damage(tree, tmp_path, capsys):
    archive = zip_of(tree, tmp_path / "pets.zip", zipfile.ZIP_BZIP2)
    damaged = bytearray(archive.read_bytes())
    damaged[damaged.index(b"BZh") + 30] ^= 255
    archive.write_bytes(damaged)
    assert "is damaged or cut short" in refusal(capsys, "--archive", archive, "--data-dir", tmp_path / "out")


def test_a_damaged_name_in_a_zip_is_damage(tmp_path, capsys):
    archive = tmp_path / "pets.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("pets/train/b\u00e4r/1.png", b"")
    archive.write_bytes(archive.read_bytes().replace("\u00e4".encode(), b"\xc3\xff"))
    assert "is damaged or cut short" in refusal(capsys, "--archive", archive, "--data-dir", tmp_path / "out")


def test_a_killed_run_leaves_no_dataset_and_the_next_one_works(zipped, tmp_path):
    script = (
        "import os, signal\nfrom image_data.preparation import archives, prepare\n"
        "def stop(items, total, what, weigh=None):\n"
        "    for number, item in enumerate(items):\n"
        "        yield item\n"
        "        if number == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "archives.progress = stop\n"
        f"prepare.prepare({str(tmp_path / 'out')!r}, archive={str(zipped)!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=PROJECT)
    assert result.returncode == -signal.SIGKILL
    assert not Dataset.is_prepared(tmp_path / "out") and not (tmp_path / "out/images").exists()
    assert len(prepare(tmp_path / "out", archive=zipped).splits["train"]) == 6
    assert not (tmp_path / "out/.partial").exists()


def test_a_folder_of_the_user_is_not_replaced(zipped, tmp_path, capsys):
    (tmp_path / "out/images").mkdir(parents=True)
    (tmp_path / "out/images/holiday.png").touch()
    assert "was not written by this script" in refusal(capsys, "--archive", zipped, "--data-dir", tmp_path / "out")
    assert (tmp_path / "out/images/holiday.png").exists()


def test_archive_without_a_tree(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    assert "holds no train/ folder" in refusal(capsys, "--archive", tmp_path / "x.zip", "--data-dir", tmp_path / "out")
    assert "does not exist" in refusal(capsys, "--archive", tmp_path / "y.zip", "--data-dir", tmp_path / "out2")


# ---- archives that Python cannot unpack, and bombs ----


def zip_of(tree: Path, path: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for image in sorted(tree.rglob("*.png")):
            file.write(image, f"pets/{image.relative_to(tree)}")
    return path


def patch_headers(path: Path, local: int, central: int, change) -> None:
    """Change one byte of every local and central header of a zip, at these offsets."""
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        at = data.find(signature)
        while at >= 0:
            data[at + offset] = change(data[at + offset])
            at = data.find(signature, at + 1)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("method", "name"), [(9, "Deflate64"), (93, "Zstandard"), (95, "XZ"), (98, "PPMd"), (77, "method 77")]
)
def test_unsupported_compression_is_named(tree, tmp_path, capsys, method, name):
    archive = zip_of(tree, tmp_path / "x.zip")
    patch_headers(archive, 8, 10, lambda _: method)
    message = refusal(capsys, "--archive", archive, "--data-dir", tmp_path / "out")
    assert f"is compressed with {name}" in message and "--root" in message and "damaged" not in message


def test_an_encrypted_archive_is_named(tree, tmp_path, capsys):
    archive = zip_of(tree, tmp_path / "x.zip")
    patch_headers(archive, 6, 8, lambda flags: flags | 1)
    message = refusal(capsys, "--archive", archive, "--data-dir", tmp_path / "out")
    assert "is encrypted" in message and "--root" in message


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_bzip2_and_lzma_are_unpacked(tree, tmp_path, method):
    assert len(prepare(tmp_path / "out", archive=zip_of(tree, tmp_path / "x.zip", method)).splits["train"]) == 6


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"7z\xbc\xaf\x27\x1c", "7-Zip archive, which is not supported. Unpack it (7z x '"),
        (b"Rar!\x1a\x07", "RAR"),
        (b"\x28\xb5\x2f\xfd", "Zstandard"),
        (b"PK\x03\x04", "beginning of a zip"),
    ],
)
def test_other_kinds_of_archives_are_named(tmp_path, capsys, start, kind):
    (tmp_path / "my x.zip").write_bytes(start + bytes(1000))
    message = refusal(capsys, "--archive", tmp_path / "my x.zip", "--data-dir", tmp_path / "out")
    assert kind in message and "--root" in message


def test_a_train_folder_that_differs_by_case_is_named(tree, tmp_path, capsys):
    (tree / "train").rename(tree / "Train")
    archive = zip_of(tree, tmp_path / "x.zip")
    message = refusal(capsys, "--archive", archive, "--data-dir", tmp_path / "out")
    assert (
        "holds no train/ folder, but Train/. Unpack it, rename Train to train and use prepare_dataset.py --root"
        in message
    )


def test_the_last_part_of_a_split_zip_is_named(tree, tmp_path, capsys):
    archive = zip_of(tree, tmp_path / "x.zip")
    data = bytearray(archive.read_bytes())
    data[data.rindex(b"PK\5\6") + 4] = 2
    archive.write_bytes(data)
    message = refusal(capsys, "--archive", archive, "--data-dir", tmp_path / "out")
    assert "last of 3 parts of a split archive" in message and "--root" in message


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_bomb_is_refused_and_the_limit_can_be_raised(tree, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED_GIB", 0.001)
    bomb, zeros = tmp_path / f"bomb.{kind}", bytes(4 << 20)
    if kind == "zip":
        zip_of(tree, bomb)
        with zipfile.ZipFile(bomb, "a", zipfile.ZIP_DEFLATED) as file:
            file.writestr("pets/train/cat/zeros.bin", zeros)
    else:
        with tarfile.open(bomb, "w:gz") as file:
            file.add(tree, "pets")
            file.addfile(member("pets/train/cat/zeros.bin", size=len(zeros)), io.BytesIO(zeros))
    message = refusal(capsys, "--archive", bomb, "--data-dir", tmp_path / "out")
    assert "unpacks to more than" in message and "--unpack-limit-gib" in message
    assert not (tmp_path / "out/images").exists()
    assert len(prepare(tmp_path / "out", archive=bomb, unpack_limit_gib=1).splits["train"]) == 6


def test_utf8_names_without_the_flag_are_read_as_utf8(tmp_path, capsys):
    """macOS and Info-ZIP write them so; code page 437 would garble the names of the classes."""
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as file:
        for name, pixels in tree_files(classes=("caf\u00e9", "\u732b")).items():
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            file.writestr(f"pets/{name}", buffer.getvalue())
    patch_headers(tmp_path / "mac.zip", 7, 9, lambda flags: flags & ~0x08)
    assert prepare(tmp_path / "out", archive=tmp_path / "mac.zip").classes == ["caf\u00e9", "\u732b"]
    data = (tmp_path / "mac.zip").read_bytes().replace("caf\u00e9".encode(), b"caf\xe9\xe9").replace
    (tmp_path / "old.zip").write_bytes(data("\u732b".encode(), b"dog"))
    capsys.readouterr()
    prepare(tmp_path / "out2", archive=tmp_path / "old.zip")
    assert "are not UTF-8 and are read as code page 437" in capsys.readouterr().err


def test_train_and_test_without_class_folders_are_not_taken_for_classes(tree, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "loose.zip", "w") as file:
        for split in ("train", "test"):
            for i, path in enumerate(sorted((tree / "train/cat").iterdir())):
                file.write(path, f"pets/{split}/{i}.png")
    words = ("--archive", tmp_path / "loose.zip", "--test-fraction", "0.34", "--data-dir", tmp_path / "out")
    assert "already holds the folder test. Omit --test-fraction" in refusal(capsys, *words)


def test_class_folders_in_an_archive_can_be_split(tree, tmp_path):
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as file:
        for path in sorted((tree / "train").rglob("*.png")):
            file.write(path, f"my/pets/{path.relative_to(tree / 'train')}")
    ready = prepare(tmp_path / "out", archive=tmp_path / "flat.zip", test_fraction=0.34)
    assert ready.classes == ["big dog", "cat"] and {name: len(ready.splits[name]) for name in ready.splits} == {
        "train": 4,
        "test": 2,
    }


@pytest.mark.parametrize(
    ("inside", "classes"),
    [
        (("car", "packed", "train"), ["car", "packed", "train"]),
        (("train/cat", "train/dog"), ["cat", "dog"]),
        (("vehicles/train", "animals/cat"), ["animals/cat", "vehicles/train"]),
    ],
)
def test_a_class_in_an_archive_may_have_the_name_of_a_folder_that_preparing_uses(tree, tmp_path, inside, classes):
    images = sorted(path for path in tree.rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as file:
        for i, path in enumerate(images[: 2 * len(inside)]):
            file.write(path, f"my/{inside[i // 2]}/{path.parent.name} {path.name}")
    ready = prepare(tmp_path / "out", archive=tmp_path / "flat.zip", test_fraction=0.5)
    assert ready.classes == classes and len(ready.splits["train"]) == len(classes)
    in_train = all(path.startswith("train/") for path in ready.splits["train"].paths)
    assert in_train == (classes == ["cat", "dog"])  # the paths choose the test split, so they stay the same


# ---- the original CIFAR archives ----


@pytest.mark.parametrize("which", [10, 100])
def test_python_archive(tmp_path, which):
    images = python_archive(tmp_path / "cifar.tar.gz", which)
    ready = prepare(tmp_path / "out", archive=tmp_path / "cifar.tar.gz")
    assert ready.classes == ["apple_tree", "plane"]
    assert {path for split in ready.splits.values() for path in split.paths} == set(images)
    for split in ready.splits.values():
        for path, label, pixels in zip(split.paths, split.labels, split.pixels(), strict=True):
            assert np.array_equal(pixels, images[path]) and path.split("/")[1] == ready.classes[label]


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, capsys):
    python_archive(
        tmp_path / "cifar.tar.gz", 100, {"train": pickle.dumps({"data": Bomb(tmp_path / "owned")}, protocol=2)}
    )
    message = refusal(capsys, "--archive", tmp_path / "cifar.tar.gz", "--data-dir", tmp_path / "out")
    assert "is rejected" in message and "cifar-100-python/train" in message and "mkdir" in message
    assert not (tmp_path / "owned").exists()


def test_python_archive_with_hostile_names_or_holes(tmp_path, capsys):
    meta = pickle.dumps({"fine_label_names": ["../../evil", "b"]}, protocol=2)
    python_archive(tmp_path / "cifar.tar.gz", 100, {"meta": meta})
    assert "unsafe name" in refusal(capsys, "--archive", tmp_path / "cifar.tar.gz", "--data-dir", tmp_path / "out")
    python_archive(tmp_path / "cifar.tar.gz", 100, {"train": pickle.dumps({}, protocol=2)})
    assert "does not hold the data of CIFAR" in refusal(
        capsys, "--archive", tmp_path / "cifar.tar.gz", "--data-dir", tmp_path / "out"
    )


# ---- downloads ----


def offline(*_, **__):
    raise OSError("Network is unreachable")


@pytest.mark.parametrize("dataset", ["cifar100", "cifar10"])
def test_without_a_network_one_sentence_says_what_to_do(tmp_path, capsys, monkeypatch, dataset):
    monkeypatch.setattr(dataset_sources, "_from_drive", offline)
    monkeypatch.setattr(dataset_sources, "_download", offline)
    message = refusal(capsys, "--dataset", dataset, "--data-dir", tmp_path / "out")
    assert "Network is unreachable" in message and "--archive FILE" in message and "--dataset shapes" in message


@pytest.mark.parametrize("full", ["_from_drive", "_download"])
def test_a_full_disk_is_not_blamed_on_the_network(tmp_path, capsys, monkeypatch, full):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset_sources, "_from_drive", offline)
    monkeypatch.setattr(dataset_sources, "_download", offline)
    monkeypatch.setattr(dataset_sources, full, no_space)
    message = refusal(capsys, "--dataset", "cifar100", "--data-dir", tmp_path / "out")
    assert "(No space left on device). Free disk space" in message and "network" not in message


def test_drive_file_is_used_only_if_its_checksum_is_the_known_one(zipped, tmp_path, monkeypatch):
    class Gdown:
        content = zipped.read_bytes()

        @classmethod
        def download(cls, output, **_):
            Path(output).write_bytes(cls.content)

    monkeypatch.setitem(sys.modules, "gdown", Gdown)
    monkeypatch.setattr(dataset_sources, "_download", offline)
    intact = Gdown.content
    for content in (b"<html>quota exceeded</html>", intact):  # the second is another zip than the published one
        Gdown.content = content
        with pytest.raises(PrepareError):
            prepare(tmp_path / "out", dataset="cifar100")
        assert not list((tmp_path / "out").glob("cifar100.zip*"))
    monkeypatch.setattr(dataset_sources, "CIFAR100_SHA256", hashlib.sha256(intact).hexdigest())
    assert len(prepare(tmp_path / "out", dataset="cifar100").splits["train"]) == 6
    monkeypatch.setitem(sys.modules, "gdown", None)  # the archive stays: no network is needed again
    assert len(prepare(tmp_path / "out", dataset="cifar100", force=True).splits["train"]) == 6
    (tmp_path / "out/cifar100.zip").write_bytes(intact + b"more")
    with pytest.raises(PrepareError, match="cifar100.zip is not the published file .*--archive"):
        prepare(tmp_path / "out", dataset="cifar100", force=True)


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
    monkeypatch.setitem(dataset_sources.TORONTO_MD5, "cifar-10-python.tar.gz", hashlib.md5(content).hexdigest())
    assert len(prepare(tmp_path / "out", dataset="cifar10").splits["train"]) == 20
