"""Paths as the screen shows them."""

from __future__ import annotations

import pytest

from common.paths import near_path


@pytest.mark.parametrize(
    ("path", "shown"),
    [("runs/a", "runs/a"), ("{here}/runs/a", "runs/a"), ("{here}", "."), ("../b", "{above}/b"), ("/x/y", "/x/y")],
)
def test_a_path_is_relative_inside_the_current_folder_and_absolute_outside(tmp_path, monkeypatch, path, shown):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert near_path(path.format(here=here)) == shown.format(above=tmp_path)


def test_a_name_that_begins_with_dots_lies_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert near_path(tmp_path / "..b") == "..b"
