"""Checkpoints and run folders without training: atomic writing, locking, pruning, and the choice of a folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import checkpoints

from common.errors import RunError
from common.files import write_atomically
from config.setting_groups import ParallelSettings
from records import checkpoint_store
from records.checkpoint_store import Checkpoints, Interval, disk_space_needed, find_damage, read_facts
from records.run_folder import RunFolder
from training import resume, resume_conditions

STATE = {
    "weights/a": torch.arange(6.0).reshape(2, 3),
    "weights/b": torch.tensor(float("nan")),
    "scalars/step": torch.tensor(3),
}
FACTS = {
    "settings": {"a": 1},
    "seed": 0,
    "max_steps": None,
    "hold_out": None,
    "preset": "x/tiny.toml",
    "total_steps": 8,
    "dataset": {"name": "shapes", "fingerprint": "f"},
}


def texts(step: int, finished: bool = False) -> dict[str, str]:
    return {
        "engine.json": json.dumps({"step": step}),
        "progress.json": json.dumps({"epoch": step, "finished": finished}),
        "run.json": json.dumps(FACTS),
        "metrics.jsonl": "",
    }


def store(record: RunFolder, keep: int = 2) -> Checkpoints:
    return Checkpoints(record.folder / "state", keep)


# --- intervals ------------------------------------------------------------------------------------------------------


def test_intervals_of_checkpoints_and_of_evaluations():
    assert Interval.parse("500steps") == Interval(steps=500) and Interval.parse("2min") == Interval(seconds=120)
    assert Interval.parse("epochs:5") == Interval(epochs=5)
    assert Interval.parse_evaluations("100steps") == Interval(steps=100)
    assert Interval.parse_evaluations("2epochs") == Interval.parse_evaluations("2") == Interval(epochs=2)
    for text in ("100steps", "2epochs"):
        assert str(Interval.parse_evaluations(text)) == text
    for parse, texts in ((Interval.parse, "epochs:0 5epochs 0steps"), (Interval.parse_evaluations, "0 10min -1 1.5")):
        for text in texts.split():
            with pytest.raises(ValueError, match=f"not {text}"):
                parse(text)


# --- atomic writing ------------------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_the_best(tmp_path):
    record = RunFolder(tmp_path)
    for step in (2, 4, 6, 8):
        store(record).write(step, STATE, texts(step), best_step=2)
    assert checkpoints(record) == ["step-00000002", "step-00000006", "step-00000008"]
    store(record, keep=1).write(10, STATE, texts(10), best_step=8)
    assert checkpoints(record) == ["step-00000008", "step-00000010"]


def test_checksums_have_the_format_of_sha256sum(tmp_path):
    store(RunFolder(tmp_path)).write(2, STATE, texts(2))
    subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"],
        cwd=tmp_path / "state" / "step-00000002",
        check=True,
        capture_output=True,
    )


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink], ids=["cut", "flipped", "deleted"])
@pytest.mark.parametrize("name", ["state.safetensors", "engine.json", "progress.json", "run.json", "SHA256SUMS"])
def test_any_damage_is_detected_and_the_previous_checkpoint_is_used(tmp_path, harm, name):
    record = RunFolder(tmp_path)
    for step in (2, 4):
        store(record).write(step, STATE, texts(step))
    harm(tmp_path / "state" / "step-00000004" / name)
    newest, said = store(record).newest_intact()
    assert (
        newest.name == "step-00000002"
        and find_damage(newest) is None
        and read_facts(newest, "progress.json")["epoch"] == 2
    )
    assert (
        len(said) == 1
        and said[0].startswith("step-00000004 is damaged (")
        and said[0].endswith("it is now state/damaged-step-00000004")
    )
    assert name == "SHA256SUMS" or name in said[0]
    assert checkpoints(record) == ["damaged-step-00000004", "step-00000002"]


def test_an_additional_file_is_detected(tmp_path):
    record = RunFolder(tmp_path)
    store(record).write(2, STATE, texts(2))
    (tmp_path / "state" / "step-00000002" / "more.json").write_text("{}")
    assert find_damage(tmp_path / "state" / "step-00000002") == "more.json is not in SHA256SUMS"


def operations(monkeypatch, fail_at: int) -> list[str]:
    """Make the `fail_at`-th flush or rename of `Checkpoints.write` fail with a full disk; return the operations."""
    done: list[str] = []

    def counted(name, function):
        def wrapper(*arguments, **keywords):
            done.append(name)
            if len(done) == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **keywords)

        return wrapper

    monkeypatch.setattr(checkpoint_store, "flush_to_disk", counted("flush", checkpoint_store.flush_to_disk))
    monkeypatch.setattr(Path, "rename", counted("rename", Path.rename))
    monkeypatch.setattr(Path, "write_text", counted("write", Path.write_text))
    return done


def write_operations(folder: Path, monkeypatch) -> list[str]:
    """The flushes, renames and writes of one checkpoint."""
    with monkeypatch.context() as patch:
        done = operations(patch, fail_at=0)
        store(RunFolder(folder)).write(4, STATE, texts(4))
    return done


def test_a_checkpoint_is_flushed_verified_renamed_and_its_folder_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(
        checkpoint_store, "flush_to_disk", lambda path, forget=False: flushed.append((path.name, forget))
    )
    removed = []
    monkeypatch.setattr(Checkpoints, "_prune", lambda self, best: removed.append(len(flushed)))
    store(RunFolder(tmp_path)).write(4, STATE, texts(4))
    names = ["state.safetensors", *texts(4)]
    assert flushed[: len(names)] == [(name, True) for name in names]  # read back from the disk, not from memory
    assert flushed[len(names) :] == [("SHA256SUMS", False), ("unfinished-step-00000004", False), ("state", False)]
    assert removed == [len(flushed)]  # older ones go when the new one is on the disk
    monkeypatch.undo()
    assert write_operations(tmp_path / "order", monkeypatch)[-2:] == ["rename", "flush"]


def test_a_flush_drops_the_file_from_the_page_cache_where_asked(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    dropped = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: dropped.append(arguments[1:]))
    checkpoint_store.flush_to_disk(tmp_path / "a")
    assert not dropped
    checkpoint_store.flush_to_disk(tmp_path / "a", forget=True)
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)]


def test_a_full_disk_at_any_operation_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    count = len(write_operations(tmp_path / "counted", monkeypatch))
    assert count > 10
    for fail_at in range(1, count + 1):
        with monkeypatch.context() as patch:
            fill_disk_at(tmp_path / str(fail_at), patch, fail_at)


def fill_disk_at(folder: Path, monkeypatch, fail_at: int) -> None:
    record = RunFolder(folder)
    store(record, keep=1).write(2, STATE, texts(2))
    done = operations(monkeypatch, fail_at)
    with pytest.raises(
        RunError,
        match=r"the checkpoint after step 4 could not be written \(No space left on device: .* are free in .*; "
        "the one after step [24] is intact; free or repair the disk and start the same run again",
    ):
        store(record, keep=1).write(4, STATE, texts(4))
    monkeypatch.undo()
    assert len(done) == fail_at
    newest, said = store(record).newest_intact()
    assert newest.name in ("step-00000002", "step-00000004") and find_damage(newest) is None and not said
    store(record, keep=1).write(4, STATE, texts(4))
    assert checkpoints(record) == ["step-00000004"]


def test_a_full_disk_while_a_checkpoint_of_the_same_step_is_replaced_leaves_it_in_its_place(tmp_path, monkeypatch):
    for fail_at in range(1, 40):
        record = RunFolder(tmp_path / str(fail_at))
        store(record, keep=1).write(2, STATE, texts(2))
        with monkeypatch.context() as patch:
            done = operations(patch, fail_at)
            try:
                store(record, keep=1).write(2, STATE, texts(2))
            except RunError as error:
                assert "the one after step 2 is intact" in str(error) and checkpoints(record) == ["step-00000002"]
        if len(done) < fail_at:
            assert fail_at > 10
            return
    raise AssertionError("the last operations never failed: raise the range")


def test_a_disk_that_returns_other_bytes_is_detected_when_writing(tmp_path, monkeypatch):
    import safetensors.torch

    store(RunFolder(tmp_path)).write(2, STATE, texts(2))
    monkeypatch.setattr(safetensors.torch, "load_file", lambda path: {**STATE, "weights/a": STATE["weights/a"] + 1e-6})
    with pytest.raises(RunError, match="returns other bytes than were written"):
        store(RunFolder(tmp_path)).write(4, STATE, texts(4))
    assert checkpoints(RunFolder(tmp_path)) == ["step-00000002"]


def test_only_the_newest_damaged_checkpoints_are_kept(tmp_path):
    record = RunFolder(tmp_path)
    for step in range(2, 12, 2):
        store(record).write(step, STATE, texts(step))
        (tmp_path / "state" / f"unfinished-step-{step + 1:08d}").mkdir()
        _, said = store(record).newest_intact()
        assert f"the run ended while step-{step + 1:08d} was being written" in said[0]
    store(record).write(12, STATE, texts(12))
    assert [name for name in checkpoints(record) if "damaged" in name] == [
        "damaged-step-00000009",
        "damaged-step-00000011",
    ]


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("500steps", Interval(steps=500)),
        ("1step", Interval(steps=1)),
        ("10min", Interval(seconds=600)),
        ("30s", Interval(seconds=30)),
    ],
)
def test_an_interval_is_parsed(text, interval):
    assert Interval.parse(text) == interval


@pytest.mark.parametrize("text", ["", "10", "0steps", "-3min", "ten min", "5 hours"])
def test_an_invalid_interval_is_rejected(text):
    with pytest.raises(ValueError, match="write it as 500steps, 10min, 30s or epochs:5"):
        Interval.parse(text)


# --- changed conditions -------------------------------------------------------------------------------------------


BEFORE = {
    "processes": 2,
    "micro_batch": 32,
    "strategy": "zero",
    "stage": 1,
    "offload": "none",
    "cuts": None,
    "threads": 4,
    "device": "CPU",
    "device_name": "x86",
    "precision": "fp32",
    "compile": "off",
    "deterministic": False,
    "source": "tensor",
    "torch": "2.11",
    "commit": "abc",
}


@pytest.mark.parametrize(
    ("now", "batch_norm", "accepted", "refused"),
    [
        ({}, True, [], []),
        (
            {"processes": 1, "micro_batch": 64},
            False,
            ["processes: 2 before, 1 now", "micro-batch size: 32 before, 64 now"],
            [],
        ),
        (
            {"processes": 1, "micro_batch": 64},
            True,
            ["processes: 2 before, 1 now"],
            ["micro-batch size: 32 before, 64 now (BatchNorm"],
        ),
        (
            {"strategy": "ddp", "stage": None, "offload": None, "cuts": [0, 2, 4]},
            False,
            ["strategy: zero before, ddp now (same sums, rounded in another order)"],
            [],
        ),
        (
            {"offload": "cpu", "cuts": [0, 2, 4]},
            False,
            [
                "device of the optimizer: none before, cpu now (its kernels",
                "first layers of the pipeline's stages: None",
            ],
            [],
        ),
        (
            {"stage": 3, "threads": 1, "torch": "2.12", "commit": "def"},
            False,
            [
                "ZeRO stage: 1 before, 3 now",
                "CPU threads: 4 before, 1 now",
                "PyTorch: 2.11 before, 2.12 now",
                "commit of this project: abc before",
            ],
            [],
        ),
        (
            {"device": "GPU", "device_name": "H200", "threads": None},
            False,
            [],
            ["device type: CPU before, GPU now (other arithmetic"],
        ),
        (
            {"precision": "autocast", "deterministic": True, "source": "resident"},
            False,
            [],
            [
                "precision: fp32 before, autocast now",
                "--deterministic: False before, True now",
                "image source: tensor before, resident now",
            ],
        ),
    ],
)
def test_each_changed_condition_has_a_sentence_and_is_accepted_or_rejected(now, batch_norm, accepted, refused):
    assert BEFORE.keys() == resume_conditions.CHANGES.keys()
    found = resume_conditions.compare(BEFORE, {**BEFORE, **now}, batch_norm)
    for sentences, starts in zip(found, (accepted, refused), strict=True):
        assert len(sentences) == len(starts) and all(
            text.startswith(start) for text, start in zip(sentences, starts, strict=True)
        ), sentences


def test_a_condition_that_an_older_checkpoint_does_not_hold_is_not_compared():
    older = {key: value for key, value in BEFORE.items() if key not in ("offload", "cuts")}
    assert resume_conditions.compare(older, {**BEFORE, "offload": "cpu"}, batch_norm=False) == ([], [])


@pytest.mark.parametrize("name", [field.name for field in fields(ParallelSettings)])
def test_of_the_settings_of_a_strategy_only_those_that_distribute_the_work_may_change(tmp_path, name):
    """The others decide what is trained: gossip's topology and order, the local steps and the outer optimizer."""
    before, now = ({**FACTS, "settings": {"parallel": {name: value}}} for value in (1, 2))
    choice(tmp_path, before, name="mine").create(before)
    if name in ("stages", "partition", "patience_seconds"):
        assert choice(tmp_path, now, name="mine").folder.name == "mine"
    else:
        with pytest.raises(RunError, match=f"settings.parallel.{name} was 1, is 2"):
            choice(tmp_path, now, name="mine")


# --- the run folder -----------------------------------------------------------------------------------------------


def choice(runs_dir: Path, facts: dict = FACTS, name: str | None = None, fresh: bool = False) -> RunFolder:
    return resume.choose_folder(runs_dir, name, fresh, facts)[0]


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


@pytest.mark.parametrize("fail_at", range(1, 30))
def test_an_intact_checkpoint_exists_at_every_moment_of_replacing_one_of_the_same_step(tmp_path, monkeypatch, fail_at):
    """Kill a process at any operation while it writes step 2 again; the next start finds an intact step 2."""
    record = RunFolder(tmp_path)
    store(record, keep=1).write(2, STATE, texts(2))

    class Killed(BaseException):
        pass

    done = []

    def interrupted(function):
        def counted(*arguments, **keywords):
            done.append(function)
            if len(done) == fail_at:
                raise Killed
            return function(*arguments, **keywords)

        return counted

    with monkeypatch.context() as patch:
        for target, name in (
            (checkpoint_store, "flush_to_disk"),
            (Path, "rename"),
            (Path, "write_text"),
            (shutil, "rmtree"),
        ):
            patch.setattr(target, name, interrupted(getattr(target, name)))
        try:
            store(record, keep=1).write(2, STATE, texts(2))
        except Killed:
            pass
    newest, _ = store(record).newest_intact()
    assert newest is not None and newest.name == "step-00000002" and find_damage(newest) is None
    assert not list((tmp_path / "state").glob("replaced-*"))
    assert fail_at < 29 or len(done) < fail_at, "the last operations were never interrupted: raise the range"
