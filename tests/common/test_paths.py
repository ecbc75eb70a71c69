"""Paths as the screen shows them."""

from __future__ import annotations

import pytest

from common.paths import name_of, near_path


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


def test_a_folder_has_a_name_also_as_a_dot_and_a_link_has_its_own(tmp_path, monkeypatch):
    """--data-dir . gave a dataset without a name."""
    (tmp_path / "pets").mkdir()
    (tmp_path / "link").symlink_to("pets")
    monkeypatch.chdir(tmp_path / "pets")
    assert [name_of(folder) for folder in (".", "..", "../link", "../pets/")] == ["pets", tmp_path.name, "link", "pets"]
