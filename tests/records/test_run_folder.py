"""Run folders: their choice, lock and files, and what a new run starts from."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from checkpoint_files import FACTS, STATE, choice, store, texts

from common.errors import RunError
from common.files import write_atomically
from records.checkpoint_store import disk_space_needed
from records.run_folder import Progress, RunFolder
from training import resume


def test_a_new_run_has_counted_nothing():
    """Sums and counters of an epoch begin at zero; no accuracy is below the first one that is measured."""
    found = dataclasses.asdict(Progress())
    assert found.pop("best_accuracy") == -1.0
    assert not any(found.values()), found


def test_the_progress_of_an_earlier_commit_is_read(tmp_path):
    """It also held what follows from the best step."""
    values = {**dataclasses.asdict(Progress(epoch=3, best_step=8)), "epochs_without_better": 1}
    (tmp_path / "progress.json").write_text(json.dumps(values))
    assert RunFolder.read_progress(tmp_path) == Progress(epoch=3, best_step=8)


def test_without_a_name_an_unfinished_run_of_the_same_settings_is_resumed(tmp_path):
    first = choice(tmp_path)
    assert first.folder.name == "tiny-shapes-seed0"
    first.create(FACTS)
    store(first).write(4, STATE, texts(4))
    assert choice(tmp_path).folder == first.folder
    store(first).write(8, STATE, texts(8, finished=True))
    assert choice(tmp_path).folder.name == "tiny-shapes-seed0-2"
    other = choice(tmp_path, {**FACTS, "settings": {"a": 2}})
    other.create({**FACTS, "settings": {"a": 2}})
    assert other.folder.name == "tiny-shapes-seed0-2" and choice(tmp_path).folder.name == "tiny-shapes-seed0-3"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"settings": {"a": 2}}, "settings.a was 1, is 2"),
        ({"max_steps": 3}, "max_steps was None, is 3"),
        ({"hold_out": 0.1}, "hold_out was None, is 0.1"),
        ({"dataset": {"name": "shapes", "fingerprint": "g"}}, "the dataset's fingerprint was 'f', is 'g'"),
    ],
)
def test_a_name_of_another_run_is_rejected_with_the_differences(tmp_path, changed, sentence):
    choice(tmp_path, name="mine").create(FACTS)
    with pytest.raises(RunError, match=sentence):
        choice(tmp_path, {**FACTS, **changed}, name="mine")
    assert choice(tmp_path, {**FACTS, **changed}, name="mine", fresh=True).folder == tmp_path / "mine"
    assert RunFolder(tmp_path / "mine.old-1").facts() == FACTS and not (tmp_path / "mine").exists()


def test_an_unreadable_run_json_is_restored_or_reported(tmp_path):
    record = RunFolder(tmp_path / "mine")
    with pytest.raises(RunError, match="mine is not a run folder"):
        record.facts()
    record.create(FACTS)
    (record.folder / "run.json").write_text("{")
    with pytest.raises(RunError, match="run.json is damaged"):
        choice(tmp_path, name="mine")
    store(record).write(4, STATE, texts(4))
    assert choice(tmp_path, name="mine").facts() == FACTS


def test_one_process_at_a_time(tmp_path):
    first, second = RunFolder(tmp_path / "mine"), RunFolder(tmp_path / "mine")
    first.lock()
    with pytest.raises(
        RunError, match=rf"mine is in use: process {os.getpid()} on \S+ trains there; wait until it ends, stop it"
    ):
        second.lock()
    with pytest.raises(RunError, match="is in use"):
        RunFolder(tmp_path / "mine").rename_aside()
    first.unlock()
    second.lock()


def test_a_runs_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/mine cannot be written \(Not a directory\); choose another --runs-dir"):
        RunFolder(tmp_path / "file" / "mine").lock()


def test_a_disk_that_is_mounted_read_only_is_named(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a disk here")
    try:
        with pytest.raises(
            RunError, match=r"disk/mine cannot be written \(Read-only file system\); choose another --runs-dir"
        ):
            RunFolder(disk / "mine").lock()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_is_replaced_atomically(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_atomically(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RunError,
        match=r"metrics.jsonl could not be written \(No space left on device\); its previous content is unchanged",
    ):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_never_end_in_a_partial_line(tmp_path):
    record = RunFolder(tmp_path)
    for epoch in (1, 2):
        record.append_metrics({"epoch": epoch})
        assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    (tmp_path / "metrics.jsonl").unlink()
    record.append_metrics({"epoch": 3})  # what was there before is not lost with the file
    assert [line["epoch"] for line in record.metrics()] == [1, 2, 3]


def test_free_disk_space_is_checked_before_the_start(tmp_path, monkeypatch):
    args = resume.FolderOptions(tmp_path, None, False, keep_checkpoints=2, allow_inexact_resume=False)
    resume.check_room(tmp_path / "new", disk_space_needed(1000, 2), args)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    with pytest.raises(
        RunError,
        match=r"needs about 20.0 MB for its checkpoints and weights, and the disk of .* has 10.0 MB left; free some",
    ):
        resume.check_room(tmp_path / "new", disk_space_needed(1_000_000, 2), args)
