"""report.py: the command, its output, and rejected input. Run: python -m pytest tests/test_report.py"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import run as run_script
from report_data import assert_stands_alone, writable_copy

import report
from common import output_files
from common.errors import DatasetError, SettingsError, UserError
from common.files import read_lines
from records.run_data import RunData
from records.run_folder import RunFolder


@pytest.fixture(scope="module")
def copied(unbroken, tmp_path_factory) -> RunFolder:
    return writable_copy(unbroken, tmp_path_factory.mktemp("reported") / "mine")


def test_report_adds_the_pictures_that_need_the_dataset(copied, shapes, done):
    out = run_script("report.py", copied.folder, "--data-dir", shapes).out
    text = (copied.folder / "report.html").read_text()
    assert_stands_alone(text, copied.folder)
    names = [name for name in ("curves", "speed", "classes", "confusion", "mistakes", "attention") if name in out]
    assert len(names) == 6
    for name in names:
        assert (copied.folder / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (copied.folder / "pictures" / f"{name}.svg").read_text()
    rows = dict(re.findall(r"<tr><td>(\w+)</td><td class=\"number\">([\d.]+)</td>", text))
    assert set(rows) == set(done.facts["dataset"]["classes"])
    assert sum(float(value) for value in rows.values()) / 10 == pytest.approx(
        100 * done.metrics[-1]["test_accuracy"], abs=0.01
    )


def test_without_the_dataset_there_is_still_a_page(copied, tmp_path):
    folder = Path(
        shutil.copytree(copied.folder, tmp_path / "moved", ignore=shutil.ignore_patterns("pictures", "report.html"))
    )
    facts = json.loads((folder / "run.json").read_text())
    facts["dataset"]["folder"] = str(tmp_path / "nowhere")
    (folder / "run.json").write_text(json.dumps(facts))
    said = run_script("report.py", folder)
    assert "warning: only the pictures that need no dataset are drawn: " in said.err and "nowhere" in said.err
    assert {path.stem for path in (folder / "pictures").iterdir()} <= {"curves", "speed", "utilisation"} and (
        folder / "report.html"
    ).is_file()
    refused = run_script("report.py", folder, "--data-dir", tmp_path / "nowhere", code=1)
    assert refused.err.startswith("error: ") and refused.err.count("\n") == 1


def test_another_dataset_does_not_replace_the_report_of_the_training(copied, shapes, tmp_path):
    other = Path(shutil.copytree(shapes, tmp_path / "other"))
    facts = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps({**facts, "fingerprint": "sha256:other"}))
    problem = "this is not the dataset of the training (its fingerprint differs)"
    before = (copied.folder / "report.html").read_text()
    words = ("report.py", copied.folder, "--data-dir", other)
    assert run_script(*words, code=1).err == f"error: {problem}; add --out FOLDER for its report\n"
    assert (copied.folder / "report.html").read_text() == before
    assert f"warning: {problem}\n" in run_script(*words, "--out", tmp_path / "its report").err
    assert "Accuracy by class" in (tmp_path / "its report" / "report.html").read_text()


def test_a_missing_library_costs_pictures_and_a_wrong_option_ends_the_report(done, shapes, monkeypatch, capsys):
    def without_dali(*args, **kwargs):
        raise DatasetError("it needs NVIDIA DALI")

    monkeypatch.setattr("dali_pipeline.Batches", without_dali)
    args = SimpleNamespace(split=None, data_dir=None, weights=None, batch_size=16, source=None, out=None)
    assert report.analyze(done, args) is None
    assert capsys.readouterr().err.endswith(" are drawn: it needs NVIDIA DALI\n")
    for given in ({"source": "files"}, {"weights": "bset.safetensors"}):
        with pytest.raises(UserError, match="NVIDIA DALI|unknown weights 'bset"):
            report.analyze(done, SimpleNamespace(**{**vars(args), **given}))


def test_a_report_can_go_into_another_folder(copied, tmp_path, monkeypatch):
    out = run_script(
        "report.py", copied.folder.name, "--runs-dir", copied.folder.parent, "--quick", "--out", tmp_path / "new"
    )
    assert "report.html" in out.out and (tmp_path / "new" / "pictures" / "curves.svg").is_file()
    assert_stands_alone((tmp_path / "new" / "report.html").read_text(), tmp_path / "new")
    run = RunData.read(copied.folder)
    monkeypatch.setattr(output_files.os, "access", lambda path, mode: False)
    with pytest.raises(SettingsError, match=r"another one: --out FOLDER\): the folder .* is not writable"):
        report.output_folder(run, None)
    with pytest.raises(SettingsError, match="does not exist. Create it: mkdir -p "):
        report.output_folder(run, tmp_path / "no" / "folder")


def test_a_picture_that_cannot_be_written_is_one_sentence(copied, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pictures").write_text("a file, where a folder is needed")
    done = run_script("report.py", copied.folder, "--quick", "--out", tmp_path / "out", code=1)
    assert done.err.startswith("error: ") and "cannot be written" in done.err and done.err.count("\n") == 1
    assert (tmp_path / "out" / "report.html").is_file()


def test_several_runs_in_one_picture(copied, tmp_path):
    other = shutil.copytree(copied.folder, tmp_path / "other", ignore=shutil.ignore_patterns("pictures"))
    for name in ("compare.svg", "compare.png"):
        out = run_script("report.py", copied.folder, other, "--out", tmp_path / name).out
        assert (tmp_path / name).stat().st_size > 5000
    accuracy = f"{100 * copied.metrics()[-1]['test_accuracy']:.2f}% test accuracy after 12 epochs"
    assert f"mine : {accuracy}" in out and f"other: {accuracy}" in out
    refused = run_script("report.py", copied.folder, other, "--out", tmp_path / "compare.doc", code=1)
    assert refused.err == "error: --out of several runs ends in .png or .svg, not '.doc'\n"


def test_what_cannot_be_reported_is_rejected_by_name(copied, tmp_path):
    assert "is not a run folder" in run_script("report.py", tmp_path, code=1).err
    empty = RunFolder(tmp_path / "empty")
    empty.create(copied.facts())
    said = run_script("report.py", empty.folder, code=1).err
    assert said.startswith(
        f"error: {empty.folder} has no finished epoch yet. Wait if it is training, or continue it: p"
    )
    assert (
        "--out of one run is a folder, not 'a.png'"
        in run_script("report.py", copied.folder, "--out", "a.png", code=1).err
    )
    assert (
        "has no validation split. Use --split test"
        in run_script("report.py", copied.folder, "--split", "validation", code=1).err
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["runs/a", "runs/b", "--weights", "best.safetensors"], "--weights does not apply to several runs"),
        (["runs/a", "runs/b", "--quick"], "--quick does not apply to several runs"),
        (["--quick", "--split", "validation"], "--split does not apply to --quick"),
        (["--index", "--data-dir", "X"], "--data-dir does not apply to --index"),
        (["--list", "--batch-size", "8"], "--batch-size does not apply to --list"),
        (["mine", "--results-dir", "X"], "--results-dir does not apply to the page of one run"),
    ],
)
def test_an_option_that_would_be_ignored_is_rejected(words, sentence):
    assert run_script("report.py", *words, code=1).err == f"error: {sentence}. Leave it out\n"


def test_a_truncated_line_is_left_out(tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert (
        read_lines(tmp_path / "steps.jsonl") == [{"step": 1}, {"step": 2}] and read_lines(tmp_path / "none.jsonl") == []
    )
