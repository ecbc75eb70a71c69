"""common/output_files.py: places that are full or read-only get a sentence. Run: python -m pytest tests/common"""

from __future__ import annotations

import errno
import os

import pytest

from common import files, output_files
from common.errors import SettingsError
from common.files import write_atomically
from common.output_files import check_new_folder, check_output_file, disk_problem
from config.command_line import run_cli


@pytest.mark.parametrize(
    ("number", "path", "sentence"),
    [
        (errno.ENOSPC, "/tmp/x", "/tmp/x cannot be written, because its disk is full; free some space"),
        (errno.EDQUOT, None, "the output cannot be written, because its disk is full"),
        (errno.EROFS, "/mnt/x", "/mnt/x cannot be used (Read-only file system); change its permissions, or name"),
        (errno.EPERM, None, None),  # of a system call, not of a file
        (errno.ENOENT, "/x", None),  # may be a defect of this project, so the traceback is kept
    ],
)
def test_a_full_or_read_only_place_is_named(number, path, sentence, capsys):
    error = OSError(number, os.strerror(number), path)

    def main() -> int:
        raise error

    if sentence is None:
        assert disk_problem(error) is None
        with pytest.raises(OSError):
            run_cli(main)
    else:
        assert run_cli(main) == 1 and capsys.readouterr().err.startswith(f"error: {sentence}")


def test_the_command_that_creates_a_folder_is_quoted(tmp_path):
    with pytest.raises(SettingsError, match=f"Create it: mkdir -p '{tmp_path}/my folder'"):
        check_output_file(tmp_path / "my folder" / "a.json", "--json")
    (tmp_path / "my folder").mkdir()
    with pytest.raises(SettingsError, match=f"for example --json '{tmp_path}/my folder/NAME'"):
        check_output_file(tmp_path / "my folder", "--json")


def test_a_pipe_is_written_and_a_link_is_written_through(tmp_path):
    """Neither becomes a regular file: as root, --json /dev/null would replace the device."""
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "elsewhere" / "a.json"
    target.parent.mkdir()
    os.mkfifo(pipe)
    link.symlink_to(target)
    for path in (pipe, link):
        check_output_file(path, "--json")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "piped")
    assert os.read(reader, 100) == b"piped" and pipe.is_fifo()
    os.close(reader)
    for text in ("new", "newer"):
        write_atomically(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "elsewhere", "link", "pipe"]


def test_a_link_into_a_missing_folder_and_a_pipe_that_is_not_writable_are_refused(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "missing" / "a.json")
    with pytest.raises(SettingsError, match="the folder .*missing does not exist"):
        check_output_file(tmp_path / "link", "--json")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(output_files.os, "access", lambda path, mode: False)
    with pytest.raises(SettingsError, match="--json .*pipe is not writable"):
        check_output_file(tmp_path / "pipe", "--json")


def test_two_processes_that_write_one_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    """One replaces the file while the other has written its own half."""
    path, flush = tmp_path / "evaluation_test.json", files.flush_to_disk

    def other_process(written):
        monkeypatch.setattr(files, "flush_to_disk", flush)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        write_atomically(path, "other")

    monkeypatch.setattr(files, "flush_to_disk", other_process)
    write_atomically(path, "mine")
    assert path.read_text() == "mine" and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_created_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_new_folder(tmp_path / "a/b", "--results-dir")
    with pytest.raises(SettingsError, match="--results-dir .*file is not a folder. Choose another --results-dir"):
        check_new_folder(tmp_path / "file/b", "--results-dir")
    monkeypatch.setattr(output_files.os, "access", lambda path, mode: False)
    with pytest.raises(SettingsError, match="is read-only. Choose another --results-dir"):
        check_new_folder(tmp_path / "a/b", "--results-dir")
