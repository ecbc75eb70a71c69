"""records/provenance.py: the commit is that of this project or unknown, and the source is what a run imports."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import types

import pytest
from programs import git

from common.paths import PROJECT
from records import provenance as module
from records.provenance import (
    changed_between,
    changed_since,
    commit_of_project,
    commit_text,
    digest_of,
    provenance,
    source_code,
    source_files,
    write_code_diff,
)


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    return folder


def commit(folder):
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    return git(folder, "rev-parse", "HEAD")


# --- commit ---------------------------------------------------------------------------------------------------------


def test_the_commit_and_whether_anything_differs_from_it(repository):
    assert commit_of_project(repository) == (None, None, "the git repository has no commit yet")
    first = commit(repository)
    assert commit_of_project(repository) == (first, False, None)
    (repository / "new.py").write_text("")
    assert commit_of_project(repository) == (first, True, None)


def test_a_download_inside_another_repository_has_no_commit(repository):
    commit(repository)
    (repository / "project").mkdir()
    found, changed, why = commit_of_project(repository / "project")
    assert found is None and changed is None and "the project is not a git repository itself" in why


def test_a_folder_without_a_repository_and_a_machine_without_git(tmp_path, monkeypatch):
    assert commit_of_project(tmp_path) == (None, None, "the project is not a git repository")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of_project(PROJECT) == (None, None, "git is not installed")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to another user")
def test_a_folder_of_another_owner_has_no_commit_and_the_way_out_is_named(repository, monkeypatch):
    commit(repository)
    for folder, _, files in os.walk(repository):
        for path in (folder, *(os.path.join(folder, file) for file in files)):
            os.chown(path, 65534, 65534)
    found, changed, why = commit_of_project(repository)
    assert found is None and changed is None and f"safe.directory {repository}" in why


def test_a_git_hook_of_another_repository_does_not_matter(repository, monkeypatch, tmp_path):
    first = commit(repository)
    (tmp_path / "other").mkdir()
    git(tmp_path / "other", "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert commit_of_project(repository)[0] == first


def test_an_unknown_commit_is_null_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = provenance()
    assert facts["commit"] is None and facts["uncommitted_changes"] is None
    assert facts["commit_unknown"] == "git is not installed" and commit_text(facts) == "unknown"
    assert commit_text({"commit": "abcdef", "uncommitted_changes": True}, 3) == "abc, with uncommitted changes"


# --- source code ----------------------------------------------------------------------------------------------------


def test_the_source_is_what_is_imported_from_the_project_and_from_own_parts(tmp_path):
    files = source_files()
    assert "records/provenance.py" in files and "common/paths.py" in files
    assert not any(path.startswith(("tests/", ".venv", "/")) or "site-packages" in path for path in files)
    own = tmp_path / "mine.py"
    own.write_text("x = 1\n")
    spec = importlib.util.spec_from_file_location("mine_for_this_test", own)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    try:
        spec.loader.exec_module(loaded)
        assert os.path.relpath(own, PROJECT) in source_files()
    finally:
        del sys.modules[spec.name]
    assert os.path.relpath(own, PROJECT) in source_files([own])


def test_a_linked_source_file_is_named_by_the_file_itself(tmp_path, monkeypatch):
    (tmp_path / "real.py").write_text("x = 1\n")
    (tmp_path / "link.py").symlink_to(tmp_path / "real.py")
    linked = types.ModuleType("linked")
    linked.__file__ = str(tmp_path / "link.py")
    monkeypatch.setitem(sys.modules, "linked", linked)
    assert {os.path.basename(path) for path in source_files()} & {"real.py", "link.py"} == {"real.py"}


def test_what_an_installed_package_compiles_is_no_source(tmp_path, monkeypatch):
    compiled = tmp_path / "cabc.py"
    compiled.write_text("x = 1\n")
    for name, counts in {"pytest.compiled.cabc": False, "mine.cabc": True, "cabc": True}.items():
        with monkeypatch.context() as patch:
            module_there = types.ModuleType(name)
            module_there.__file__ = str(compiled)
            patch.setitem(sys.modules, name, module_there)
            assert (os.path.relpath(compiled, PROJECT) in source_files()) is counts, name


def test_an_edit_of_an_imported_file_counts_even_in_a_comment(monkeypatch, tmp_path):
    for name in ("imported.py", "other.py"):
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr(module, "PROJECT", tmp_path)
    monkeypatch.setattr(module, "source_files", lambda own_parts=(): ["imported.py"])
    before = source_code()
    (tmp_path / "other.py").write_text("x = 2\n")
    assert source_code() == before and changed_since(before) == []
    (tmp_path / "imported.py").write_text("x = 1  # why\n")
    assert source_code()["fingerprint"] != before["fingerprint"]
    assert changed_since(before) == ["imported.py"] and changed_between(before, source_code()) == ["imported.py"]
    (tmp_path / "imported.py").unlink()
    assert changed_since(before) == ["imported.py"] and digest_of("imported.py") is None


def test_the_source_is_that_of_the_import_even_if_a_file_is_edited_before_it_is_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "PROJECT", tmp_path)
    monkeypatch.setattr(module, "source_files", lambda own_parts=(): ["imported.py"])
    monkeypatch.setattr(module, "_imported", {})
    (tmp_path / "imported.py").write_text("a = 1\n")
    before = module.digest_of("imported.py")
    module.remember_source()
    (tmp_path / "imported.py").write_text("a = 2\n")
    module.remember_source()  # again, as in a run that another part of the process has prepared
    code = source_code()
    assert code["files"] == {"imported.py": before} and changed_since(code) == ["imported.py"]


def test_files_that_only_one_of_two_runs_imported_do_not_count():
    old, new = {"files": {"a.py": "1", "b.py": "2"}}, {"files": {"a.py": "1", "c.py": "3"}}
    assert changed_between(old, new) == [] and changed_between(old, {"files": {"a.py": "2"}}) == ["a.py"]


def test_code_diff_rebuilds_what_was_trained(repository, monkeypatch, tmp_path):
    texts = {"tracked.py": "a = 1\nb = 2\n", "same.py": "c = 3\n"}
    for name, text in texts.items():
        (repository / name).write_text(text)
    commit(repository)
    clone = tmp_path / "clone"
    shutil.copytree(repository, clone)
    changed = {"tracked.py": "a = 1\nb = 3\n", "new.py": "d = 4", "same.py": "c = 3\n"}
    for name, text in changed.items():
        (repository / name).write_text(text)
    (repository / "not_imported.py").write_text("e = 5\n")
    monkeypatch.setattr(module, "PROJECT", repository)
    path = write_code_diff(tmp_path, {"files": dict.fromkeys(changed, "")})
    assert path == tmp_path / "code.diff"
    git(clone, "apply", str(path))
    assert {name: (clone / name).read_text() for name in changed} == changed
    assert not (clone / "not_imported.py").exists()
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    write_code_diff(tmp_path, {"files": dict.fromkeys(changed, "")})
    assert "limit 10" in path.read_text()
    assert write_code_diff(tmp_path, {"files": {"same.py": ""}}) is None and not path.exists()
