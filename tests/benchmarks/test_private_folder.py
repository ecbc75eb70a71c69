"""The folder of built extensions belongs to this user alone, whoever was at its predictable name first."""

from __future__ import annotations

import os

import pytest

from benchmarks.lib.private_folder import private_folder


def test_a_private_folder_is_created_and_used_again(tmp_path):
    folder = private_folder("x", tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700 and folder == tmp_path / f"x-{os.getuid()}"
    folder.chmod(0o755)
    assert private_folder("x", tmp_path) == folder and folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["writable for others", "of another user", "link", "file"])
def test_a_folder_that_others_could_have_prepared_is_not_used(tmp_path, kind):
    folder = tmp_path / f"x-{os.getuid()}"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        folder.touch(mode=0o600)
    else:
        folder.mkdir(mode=0o700)
        if kind == "writable for others":
            folder.chmod(0o777)
        elif os.getuid() != 0:
            pytest.skip("only root can give a folder to another user")
        else:
            os.chown(folder, 12345, 12345)
    found = private_folder("x", tmp_path)
    assert found != folder and found.is_dir() and found.stat().st_mode & 0o777 == 0o700
