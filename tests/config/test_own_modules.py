"""User-defined files: how a path is read, and how a file is imported with its neighbors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from project_files import project_files

from common.errors import SettingsError
from common.paths import PROJECT
from comparison.experiment_file import read as read_experiment
from config.own_modules import files_of, import_file, neighbors
from config.own_parts import OwnPart, load
from config.settings import resolve


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def value_of(text: str) -> str:
    return resolve(None, [f"model.feed_forward={text}"]).model.feed_forward


def test_a_path_is_relative_to_the_current_folder_or_home_or_absolute(tmp_path, monkeypatch):
    write(tmp_path / "two words", mine="def Part(dims): ...\n")
    expected = f"{tmp_path}/two words/mine.py:Part"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "two words")
    assert {
        value_of(t) for t in ("mine.py:Part", "../two words/mine.py:Part", "~/two words/mine.py:Part", expected)
    } == {expected}
    assert value_of(f"{PROJECT}/models/feed_forward.py:MLP") == "models/feed_forward.py:MLP"
    with pytest.raises(SettingsError, match="there is no file .*/two words/other.py; give its path from the current"):
        value_of("other.py:Part")
    with pytest.raises(SettingsError, match=r"mine.py names a file but no class or function in it; write mine.py:NAME"):
        value_of("mine.py")


def test_a_preset_names_files_next_to_it(tmp_path, monkeypatch):
    write(tmp_path, mine="def Part(dims): ...\n")
    (tmp_path / "own.toml").write_text('model.feed_forward = "mine.py:Part"\n')
    monkeypatch.chdir("/")
    assert resolve(str(tmp_path / "own.toml"), []).model.feed_forward == f"{tmp_path}/mine.py:Part"


def test_a_preset_and_an_experiment_name_no_files_of_other_folders(tmp_path, monkeypatch):
    write(tmp_path, mine="def Part(dims): ...\n")
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("mine.py", "models/feed_forward.py"):
        file = inner / "own.toml"
        file.write_text(f'model.feed_forward = "{name}:Part"\n')
        missing = f"own.toml: {name}:Part: there is no file {inner}/{name}; give its path from the folder of this file"
        with pytest.raises(SettingsError, match=missing):
            resolve(str(file), [])
        with pytest.raises(SettingsError, match=missing):
            read_experiment(file)


def test_files_of_one_name_and_their_neighbors_are_independent(tmp_path):
    text = "import helper\nimport pack.inner as inner\nfrom pack import other\nimport pack.deep\ndef f():\n"
    text += "    import late\n    return helper.N, inner.N, other.N, late.N, pack.deep.N\n"
    found = {}
    for folder in ("a", "b"):
        own = {"helper": 1, "pack__inner": 2, "pack__other": 3, "late": 4, "pack__deep": 5}
        write(tmp_path / folder, mine=text, **{name: f"N = '{folder}{n}'\n" for name, n in own.items()})
        found[folder] = import_file(tmp_path / folder / "mine.py")
    before = list(sys.path)
    assert [found[folder].f() for folder in "ab"] == [tuple(f"{folder}{n}" for n in (1, 2, 3, 4, 5)) for folder in "ab"]
    assert sys.path == before and "helper" not in sys.modules
    assert not list(tmp_path.rglob("__pycache__"))
    kept = {str(path.relative_to(tmp_path / "a")) for path in files_of(tmp_path / "a" / "mine.py")}
    assert kept == {"mine.py", "helper.py", "late.py", "pack/inner.py", "pack/other.py", "pack/deep.py"}


def test_a_neighbor_comes_before_the_project_and_the_project_is_found_without_one(tmp_path):
    write(
        tmp_path / "a", mine="from models.parts import Dimensions\nfrom models.mine import N\n", models__mine="N = 1\n"
    )
    module = import_file(tmp_path / "a" / "mine.py")
    from models.parts import Dimensions

    assert module.Dimensions is Dimensions and module.N == 1


def test_in_the_folder_of_the_project_its_own_modules_are_no_neighbors():
    scripts = {name.removesuffix(".py") for name in project_files(".py") if "/" not in name}
    assert {"train", "compare", "report"} <= scripts
    for name in (*scripts, "benchmarks", "environment", "tools.list_settings", "models.parts"):
        assert neighbors(PROJECT, name) == []


def test_a_changed_file_or_neighbor_is_imported_again(tmp_path):
    write(tmp_path, mine="from helper import N\n", helper="N = 1\n")
    first = import_file(tmp_path / "mine.py")
    assert import_file(tmp_path / "mine.py") is first
    write(tmp_path, helper="N = 2\n")
    assert import_file(tmp_path / "mine.py").N == 2 and first.N == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import nonsuch\n", r"ModuleNotFoundError: No module named 'nonsuch' \(mine.py, line 1\)"),
        ("x = 1\ndef f(:\n", r"SyntaxError: .* \(mine.py, line 2\)"),
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3 \(mine.py, line 2\)"),
        ("import helper\n", r"ZeroDivisionError: division by zero \(helper.py, line 1\)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_sentence(tmp_path, text, sentence):
    write(tmp_path, mine=text, helper="1 / 0\n")
    with pytest.raises(SettingsError, match=sentence):
        load(OwnPart(tmp_path / "mine.py", "f"))
