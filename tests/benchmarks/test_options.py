"""The options of the benchmarks: an output path or a number that cannot be used is named before the measurement."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentTypeError

import programs
import pytest

from benchmarks import fault_matrix, run_index
from benchmarks.lib.options import output_file, output_folder
from common import output_files
from common.errors import UserError


def test_an_output_path_is_checked_before_the_measurement(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in ("file", "new", "new/below/it"):
        assert output_file(str(tmp_path / path)) == tmp_path / path
    assert output_folder(str(tmp_path)) == tmp_path and output_folder(str(tmp_path / "a/b")) == tmp_path / "a/b"
    assert sorted(os.listdir(tmp_path)) == ["file"]
    for check, path, sentence in (
        (output_file, "", "is a folder; name a file in it"),
        (output_file, "file/below", "is not a folder. Choose another folder"),
        (output_folder, "file", "is not a folder. Choose another folder"),
    ):
        with pytest.raises(ArgumentTypeError, match=sentence):
            check(str(tmp_path / path))
    monkeypatch.setattr(output_files.os, "access", lambda path, mode: False)
    for check, path in ((output_file, "file"), (output_file, "new"), (output_folder, "new")):
        with pytest.raises(ArgumentTypeError, match="is not writable|is read-only"):
            check(str(tmp_path / path))


@pytest.mark.parametrize(
    ("program", "words", "sentence"),
    [
        ("strategies", ["--out", __file__], "--out: folder"),
        ("gpu_check", ["--out", __file__], "--out: folder"),
        ("mutation", ["--out", __file__], "--out: folder"),
        ("checkpoint_cost", ["--runs-dir", __file__], "--runs-dir: folder"),
        ("checkpoint_cost", ["--out", "/"], "--out: / is a folder"),
        ("fault_matrix", ["--out", "/"], "--out: / is a folder"),
        ("warm_runs", ["--out", "/"], "--out: / is a folder"),
        ("run_index", ["--out", "/"], "--out: / is a folder"),
        ("freed_memory", ["--json", "/"], "--json: / is a folder"),
        ("step_profile", ["--json", "/"], "--json: / is a folder"),
        ("step_parts", ["--json", "/"], "--json: / is a folder"),
        ("input_pipeline", ["--device", "gpu"], "--device: invalid choice: 'gpu'"),
        ("input_pipeline", ["--turn-seconds", "nan"], "--turn-seconds: must be a number above 0"),
        ("parallel_runs", ["--seconds", "0"], "--seconds: must be a number above 0"),
        ("recipe_costs", ["--peak", "0"], "--peak: must be a number above 0"),
        ("strategies", ["--limit-seconds", "0"], "--limit-seconds: must be a number above 0"),
    ],
)
def test_an_unusable_value_is_one_sentence(program, words, sentence):
    said = programs.run(f"benchmarks/{program}.py", *words, code=2).err
    assert said.startswith(f"error: argument {sentence}") and said.count("\n") == 1


def test_the_help_states_the_default_preset_of_the_program():
    assert "(default: cpu-quick)" in programs.run("benchmarks/freed_memory.py", "--help").out


def test_a_full_disk_alone_needs_the_right_to_mount_one(monkeypatch):
    monkeypatch.setattr(fault_matrix, "may_mount", lambda: False)
    monkeypatch.setattr(sys, "argv", ["fault_matrix.py", "--faults", "disk-full"])
    with pytest.raises(UserError, match="disk-full needs a process that may mount a disk"):
        fault_matrix.main()


def test_the_page_of_a_single_run_can_be_timed(monkeypatch, capsys):
    def seconds_of(runs, *options):
        for name in ("index.html", ".index-cache.json"):
            (runs / name).touch()
        return {"wall": 1.0, "cpu": 1.0}

    monkeypatch.setattr(run_index, "seconds_of", seconds_of)
    monkeypatch.setattr(sys, "argv", ["run_index.py", *"--runs 1 --epochs 1 --losses 1 --repeats 1".split()])
    assert run_index.main() == 0 and "warm median" in capsys.readouterr().out
