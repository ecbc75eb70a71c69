"""prepare_dataset.py: reproducible files, the drawn dataset, and the command (see also tests/image_data).

pytest tests/test_prepare_dataset.py            no network, no GPU, a few seconds
pytest tests/test_prepare_dataset.py -m slow    the real CIFAR-100 archive: data/cifar100/cifar100.zip or $CIFAR100_ZIP
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trees import WRITTEN, noise, refusal, save, tree_files, written

from common.errors import DatasetError, StoppedError
from common.paths import DATA, PROJECT
from common.stop_signal import StopSignal
from dali_pipeline import Batches
from image_data.dataset import KNOWN, PREPARED_FROM, Dataset, prepare_again
from image_data.preparation import decoding, drawn_shapes
from image_data.preparation import prepare as prepare_module
from image_data.preparation import source as source_module
from image_data.preparation.decoding import CHUNK, decoder, useful_workers
from image_data.preparation.downloads import CIFAR100_SHA256, SOURCES
from image_data.preparation.drawn_shapes import SHAPES
from image_data.preparation.image_tree import PrepareError
from image_data.preparation.jpeg_traces import looks_like_jpeg
from image_data.preparation.prepare import find_or_prepare, prepare
from image_data.preparation.source import Source
from image_data.readers import FileReader
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
        and "add --force to prepare again" in said
    )
    assert len(prepare(tmp_path / "out", root=tree, force=True).splits["train"]) == 7


def test_force_without_a_source_keeps_the_source_of_the_folder(tree, zipped, tmp_path, capsys):
    """The images of a user would otherwise be replaced by CIFAR-100, the default dataset."""
    small = {"side": 16, "train_per_class": 2, "test_per_class": 2}
    prepare(tmp_path / "pets", archive=zipped)
    prepare(tmp_path / "elsewhere", root=tree)
    prepare(tmp_path / "drawn", dataset="shapes", shapes=small)
    prepare(tree)
    before = {name: written(tmp_path / name) for name in ("pets", "elsewhere", "tree")}

    def force(name):
        return refusal(capsys, "--data-dir", tmp_path / name, "--force")

    assert f"was prepared from {zipped.name}. Add --archive with its path" in force("pets")
    assert "was prepared from the image tree tree. Add --root with its path" in force("elsewhere")
    assert prepare(tmp_path / "drawn", force=True, shapes=small).classes == sorted(SHAPES)
    (tree / "dataset.json").unlink()
    assert prepare(tree).classes == ["big dog", "cat"]
    assert {name: written(tmp_path / name) for name in before} == before
    (tmp_path / "pets/prepared_from.json").unlink()  # as earlier versions left it
    assert "its source is not recorded. Add --dataset, --archive or --root" in force("pets")


def test_a_folder_of_other_images_is_not_taken_for_a_named_dataset(tree, zipped, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(source_module, "DATA", tmp_path)
    monkeypatch.setattr(prepare_module, "DATA", tmp_path)
    prepare(tree)
    prepare(tmp_path / "shapes", archive=zipped)
    for data_dir, dataset in ((tree, "cifar100"), (None, "shapes")):
        with pytest.raises(DatasetError, match=f"and --dataset {dataset} would be ignored. Choose another --data-dir"):
            find_or_prepare(data_dir, dataset, None)
    (tree / "prepared_from.json").write_text('{"dataset": "cifar100"}')  # as earlier versions recorded a tree in place
    with pytest.raises(DatasetError, match="was prepared from tree, and --dataset cifar100"):
        find_or_prepare(tree, "cifar100", None)
    prepare(archive=shutil.copy(zipped, tmp_path / "cifar100.zip"))
    assert find_or_prepare(None, "cifar100", None) == tmp_path / "cifar100"


def test_the_command_that_prepares_a_missing_dataset_names_its_source(tree, tmp_path):
    assert tuple(SOURCES) == KNOWN
    for folder, command in (
        (tree, f"--data-dir {tree}"),
        (tmp_path / "shapes", "/shapes --dataset shapes"),
        (tmp_path / "pets", "/pets --archive FILE (or --root DIR, or --dataset NAME)"),
    ):
        with pytest.raises(DatasetError) as error:
            Dataset.open(folder)
        assert str(error.value).endswith(command)


def test_the_command_that_prepares_a_dataset_again_is_complete(tree, zipped, tmp_path):
    """Each was refused before, since --force alone does not find these sources."""
    out = tmp_path / "my pets"
    for sources, options in (
        ({"archive": zipped}, f"--archive PATH/{zipped.name}"),
        ({"root": tree}, f"--root {tree}"),
        ({"root": tree / "train", "test_fraction": 0.4}, f"--root {tree}/train --test-fraction 0.4"),
    ):
        prepare(out, **sources, force=True)
        assert prepare_again(out) == f"python prepare_dataset.py --data-dir '{out}' {options} --force"
    reader = FileReader([tree / "gone.png"], 1, out)
    shutil.move(tree, tmp_path / "elsewhere")
    again = f"prepare_dataset.py --data-dir '{out}' --root NEW_PLACE --test-fraction 0.4 --force"
    with pytest.raises(DatasetError, match=f"Restore the file, or run: python {again}"):
        reader.read(np.array([0]))


def test_the_command_that_replaces_another_source_is_quoted(tree, zipped, tmp_path):
    prepare(tmp_path / "my pets", root=tree)
    again = f"--data-dir '{tmp_path}/my pets' --archive '{tmp_path}/my pets.zip' --force"
    with pytest.raises(DatasetError, match=f"python prepare_dataset.py {again}"):
        find_or_prepare(tmp_path / "my pets", None, zipped.rename(tmp_path / "my pets.zip"))


def test_a_dataset_is_prepared_where_train_py_looks_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, name in ((Source("shapes", None, None), "shapes"), (Source(None, Path("pets.zip"), None), "pets")):
        assert source.default_folder() == PROJECT / "data" / name


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


def test_a_preparation_that_fails_removes_what_it_created(tree, zipped, tmp_path, capsys):
    (tmp_path / "bad.zip").write_bytes(zipped.read_bytes()[:-500])
    refusal(capsys, "--archive", tmp_path / "bad.zip", "--data-dir", tmp_path / "new/pets")
    assert not (tmp_path / "new").exists()
    shutil.rmtree(tree / "test")
    before = sorted(tree.rglob("*"))
    refusal(capsys, "--root", tree)
    assert sorted(tree.rglob("*")) == before


def test_a_process_that_waits_for_one_that_fails_locks_anew(tmp_path):
    """The first removes the lock that the second waits for; a third must then wait for the second."""
    folder, waiting, inside, done = tmp_path / "new", threading.Event(), threading.Event(), threading.Event()

    def second():
        waiting.set()
        with prepare_module._created_and_locked(folder):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=second)
    with pytest.raises(PrepareError), prepare_module._created_and_locked(folder):
        thread.start()
        waiting.wait(10)
        time.sleep(0.2)  # until it waits for the lock
        raise PrepareError
    assert inside.wait(10)
    with open(folder / ".prepare.lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    done.set()
    thread.join()


def test_the_record_of_the_source_is_that_of_the_data_after_an_interruption(tree, zipped, tmp_path, monkeypatch):
    prepare(tmp_path / "out", archive=zipped)
    before = {**written(tmp_path / "out"), "record": (tmp_path / "out" / PREPARED_FROM).read_bytes()}

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "_fingerprint", interrupted)
        prepare(tmp_path / "out", archive=shutil.copy(zipped, tmp_path / "other.zip"), force=True)
    assert before == {**written(tmp_path / "out"), "record": (tmp_path / "out" / PREPARED_FROM).read_bytes()}
    prepare(tmp_path / "out", archive=tmp_path / "other.zip", force=True)
    assert json.loads((tmp_path / "out" / PREPARED_FROM).read_text())["archive"] == "other.zip"


@pytest.mark.parametrize("source", ["root", "archive", "dataset"])
def test_a_stop_ends_a_preparation_soon_and_removes_what_it_created(
    tree, zipped, tmp_path, monkeypatch, signals, source
):
    StopSignal()
    begun = []

    def slow(*args, **options):
        begun.append(args)
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    module, name, what, given = {
        "root": (decoding, "decode_image", "decoding train images", tree),
        "archive": (shutil, "copyfileobj", "unpacking", zipped),
        "dataset": (drawn_shapes, "draw", "drawing shapes", "shapes"),
    }[source]
    original = getattr(module, name)
    monkeypatch.setattr(decoding, "CHUNK", 1)
    monkeypatch.setattr(module, name, slow)
    with pytest.raises(StoppedError, match=f"stopped while {what}; the same command starts again"):
        prepare(tmp_path / "out", **{source: given}, workers=1)
    assert len(begun) <= 2 and not (tmp_path / "out").exists()


def test_a_stop_ends_the_wait_for_another_process_that_prepares(tmp_path, signals):
    StopSignal()
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".prepare.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(StoppedError, match="stopped while waiting for the process that prepares"):
            prepare(tmp_path / "out", dataset="shapes")
    assert (tmp_path / "out" / ".prepare.lock").exists()  # the other process holds it


def test_a_stop_ends_a_download_that_cannot_ask(tmp_path, monkeypatch, signals):
    import gdown

    StopSignal()
    monkeypatch.setattr(gdown, "download", lambda **_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(30))
    with pytest.raises(StoppedError, match=r"stopped while downloading cifar100.zip"):
        prepare(tmp_path / "out", dataset="cifar100")
    assert not (tmp_path / "out").exists() and not StopSignal.newest.ends_at_once


def test_force_that_fails_keeps_what_was_prepared(zipped, tmp_path):
    prepare(tmp_path / "out", archive=zipped)
    before = written(tmp_path / "out")
    (tmp_path / "bad.zip").write_bytes(zipped.read_bytes()[:-500])
    with pytest.raises(PrepareError):
        prepare(tmp_path / "out", archive=tmp_path / "bad.zip", force=True)
    assert written(tmp_path / "out") == before
    assert len(list((tmp_path / "out/images").rglob("*.png"))) == 10


def test_a_preparation_killed_between_two_replaced_files_leaves_no_dataset(tree, tmp_path, monkeypatch):
    """With --force the new arrays would otherwise stand next to the description of the old ones."""
    prepare(tmp_path / "out", root=tree)
    save(tree / "train/cat/image 9.png", noise(90))
    replace, calls = os.replace, []
    for survived in range(6):

        def stop(source, target, survived=survived):
            calls.append(target)
            if len(calls) > survived:
                raise KeyboardInterrupt
            replace(source, target)

        calls.clear()
        monkeypatch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "out", root=tree, force=True)
        monkeypatch.setattr(os, "replace", replace)
        assert not (tmp_path / "out/dataset.json").exists(), f"killed after {survived} replaced files"
    assert len(prepare(tmp_path / "out", root=tree).splits["train"]) == 7


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


def test_a_record_of_the_source_that_is_no_object_is_left_out(tree):
    prepare(tree)
    (tree / PREPARED_FROM).write_text("null")
    assert source_module.recorded(tree) == {}


def test_an_empty_file_of_pixels_is_named(tree):
    dataset = prepare(tree)
    dataset.splits["train"].packed.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"train.npy is damaged .*Run: python prepare_dataset.py"):
        dataset.splits["train"].pixels()


def test_a_full_shared_memory_costs_workers_only(tree, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("image_data.preparation.decoding.ProcessPoolExecutor", full)
    monkeypatch.setattr("image_data.preparation.decoding.CHUNK", 1)
    assert len(prepare(root=tree, workers=2).splits["train"]) == 6
    assert "warning: decoding in one process, because /dev/shm is not usable" in capsys.readouterr().err


def test_only_as_many_processes_are_started_as_there_are_chunks_of_a_split():
    assert useful_workers(8, [CHUNK, 1]) == 1  # decoded in this process: the splits come one after the other
    assert [useful_workers(8, [1, n * CHUNK + 1]) for n in (1, 2, 100)] == [2, 3, 8]


def test_decoding_processes_are_new_and_ctrl_c_does_not_reach_them():
    """A fork of a program with threads may crash."""
    forked = "'pytest' in __import__('sys').modules"
    blocked = "2 in __import__('signal').pthread_sigmask(0, [])"
    with decoder(2) as decode:
        assert list(decode(eval, [forked, blocked] * 2)) == [False, True] * 2
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


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
    assert "is not a file. For a folder of images use --root" in refusal(
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


def test_train_py_does_not_prepare_another_archive_as_cifar100(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "DATA", tmp_path)
    with pytest.raises(
        DatasetError, match=r"pets.zip would be prepared in .*cifar100, the folder of CIFAR-100. Add --d"
    ):
        find_or_prepare(None, None, Path("pets.zip"))
    with pytest.raises(DatasetError, match=r"cifar-100-python.tar.gz does not exist"):
        find_or_prepare(None, None, Path("cifar-100-python.tar.gz"))


def test_a_pipe_in_a_tree_is_named_and_not_read(tree, capsys):
    os.mkfifo(tree / "train/cat/pipe.png")
    assert "train/cat/pipe.png (not a regular file)" in refusal(capsys, "--root", tree, "--workers", 1)


def test_a_script_without_a_guard_decodes_in_processes(tmp_path):
    """The new processes do not run the script that prepares."""
    script = tmp_path / "mine.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(PROJECT)!r})\nprint('begins', flush=True)\n"
        "from image_data.preparation.decoding import decoder\n"
        "with decoder(2) as decode:\n    print(list(decode(abs, [-1, 2])))\n"
    )
    for source in ({"args": [sys.executable, script]}, {"args": [sys.executable, "-"], "input": script.read_text()}):
        run = subprocess.run(**source, capture_output=True, text=True, timeout=60)
        assert run.stdout == "begins\n[1, 2]\n" and not run.stderr, run.stderr


def test_a_stop_of_the_process_group_is_no_lack_of_memory(monkeypatch):
    """Slurm and `timeout` signal the decoding processes too, which end at once."""
    monkeypatch.setattr(StopSignal, "newest", stop := StopSignal.__new__(StopSignal))
    stop.number = signal.SIGTERM
    dies = "__import__('os').kill(__import__('os').getpid(), 15)"
    with pytest.raises(StoppedError, match="decoding images"), decoder(2) as decode:
        list(decode(eval, [dies]))
    monkeypatch.setattr(StopSignal, "newest", None)
    with pytest.raises(PrepareError, match="out of memory"), decoder(2) as decode:
        list(decode(eval, [dies]))


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = (
        "import os, signal\nfrom image_data.preparation.decoding import decoder\n"
        "with decoder(2) as decode:\n"
        "    print(list(decode(abs, [1, 2, 3])), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT, stdout=subprocess.PIPE, start_new_session=True)
    try:
        # Returns only when every process that holds the pipe is gone.
        assert run.communicate(timeout=20)[0] == b"[1, 2, 3]\n"
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise


def test_two_runs_at_once_make_one_dataset(zipped, tmp_path):
    command = [sys.executable, PROJECT / "prepare_dataset.py", "--archive", zipped, "--data-dir", tmp_path / "out"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(run.communicate()[0].split(" ")[0] for run in runs)
    assert said == ["already", "prepared"] and [run.returncode for run in runs] == [0, 0]


def test_a_training_process_that_waited_for_the_other_one_to_prepare_prints_nothing(
    zipped, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "out"
    prepare(folder, archive=zipped)
    capsys.readouterr()
    answers = iter([False, False])  # not prepared when it looks, prepared when it has the lock
    prepared = Dataset.is_prepared
    monkeypatch.setattr(Dataset, "is_prepared", lambda path: next(answers, None) is None and prepared(path))
    assert find_or_prepare(folder, None, zipped) == folder and capsys.readouterr().out == ""


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
