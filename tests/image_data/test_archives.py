"""prepare_dataset.py on archives, whole, hostile or damaged; on the original CIFAR files; and with or without a network."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from trees import member, python_archive, refusal

from common.paths import PROJECT
from image_data.dataset import Dataset
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
    assert "neither a zip nor a tar archive" in refusal(capsys, "--archive", zipped, "--data-dir", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".prepare.lock"]


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
    assert "is in the way" in refusal(capsys, "--archive", zipped, "--data-dir", tmp_path / "out")
    assert (tmp_path / "out/images/holiday.png").exists()


def test_archive_without_a_tree(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    assert "holds no train/ folder" in refusal(capsys, "--archive", tmp_path / "x.zip", "--data-dir", tmp_path / "out")
    assert "does not exist" in refusal(capsys, "--archive", tmp_path / "y.zip", "--data-dir", tmp_path / "out2")


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


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, capsys):
    python_archive(
        tmp_path / "cifar.tar.gz", 100, {"train": pickle.dumps({"data": Malicious(tmp_path / "owned")}, protocol=2)}
    )
    message = refusal(capsys, "--archive", tmp_path / "cifar.tar.gz", "--data-dir", tmp_path / "out")
    assert "is refused" in message and "cifar-100-python/train" in message and "mkdir" in message
    assert not (tmp_path / "owned").exists()


def test_python_archive_with_hostile_names_or_holes(tmp_path, capsys):
    meta = pickle.dumps({"fine_label_names": ["../../evil", "b"]}, protocol=2)
    python_archive(tmp_path / "cifar.tar.gz", 100, {"meta": meta})
    assert "unsafe name" in refusal(capsys, "--archive", tmp_path / "cifar.tar.gz", "--data-dir", tmp_path / "out")
    python_archive(tmp_path / "cifar.tar.gz", 100, {"train": pickle.dumps({}, protocol=2)})
    assert "does not hold what CIFAR holds" in refusal(
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
    monkeypatch.setitem(
        dataset_sources.TORONTO_MD5, "cifar-10-python.tar.gz", dataset_sources._md5(tmp_path / "mini.tar.gz")
    )
    assert len(prepare(tmp_path / "out", dataset="cifar10").splits["train"]) == 20
