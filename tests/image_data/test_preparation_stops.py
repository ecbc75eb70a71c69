"""A preparation that fails, is stopped or killed leaves no half dataset; two at once make one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from trees import noise, refusal, save, written

from common.errors import StoppedError
from common.paths import PROJECT
from common.stop_signal import StopSignal
from image_data.dataset import PREPARED_FROM, Dataset
from image_data.preparation import decoding, drawn_shapes
from image_data.preparation import prepare as prepare_module
from image_data.preparation.image_tree import PrepareError
from image_data.preparation.prepare import find_or_prepare, prepare


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


def test_two_runs_at_once_make_one_dataset(zipped, tmp_path):
    command = [sys.executable, PROJECT / "prepare_dataset.py", "--archive", zipped, "--data-dir", tmp_path / "out"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(run.communicate(timeout=60)[0].split(" ")[0] for run in runs)
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
