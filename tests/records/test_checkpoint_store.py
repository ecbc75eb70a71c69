"""records/checkpoint_store.py: intervals, atomic writing, damage, and pruning of checkpoints, without training."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from checkpoint_files import STATE, store, texts
from small_runs import checkpoints

from common.errors import RunError
from records import checkpoint_store
from records.checkpoint_store import Checkpoints, Interval, find_damage, read_facts
from records.run_folder import RunFolder

# --- intervals ------------------------------------------------------------------------------------------------------


def test_intervals_of_checkpoints_and_of_evaluations():
    assert Interval.parse("500steps") == Interval(steps=500) and Interval.parse("2min") == Interval(seconds=120)
    assert Interval.parse("epochs:5") == Interval(epochs=5)
    assert Interval.parse_evaluations("100steps") == Interval(steps=100)
    assert Interval.parse_evaluations("2epochs") == Interval.parse_evaluations("2") == Interval(epochs=2)
    for text in ("100steps", "2epochs"):
        assert str(Interval.parse_evaluations(text)) == text
    for parse, invalid in ((Interval.parse, "epochs:0 5epochs 0steps"), (Interval.parse_evaluations, "0 10min -1 1.5")):
        for text in invalid.split():
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
