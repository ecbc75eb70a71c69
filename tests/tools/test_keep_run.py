"""tools/keep_run.py: a saved run has all numbers and no path of the machine.

Run: python -m pytest tests/tools/test_keep_run.py
"""

from __future__ import annotations

import json

import pytest

from common.errors import RunError
from records.run_folder import RunFolder
from tools.keep_run import kept


def test_paths_of_the_machine_are_cut_and_numbers_kept(tmp_path):
    record = RunFolder(tmp_path / "mine")
    record.create(
        {
            "command": [
                *("train.py", "--archive", "/home/me/cifar100.zip", "--seed", "3", "--stage-to=/home/me/a=b"),
                *("--set=model.attention=/home/me/mine.py:Part", "--set", 'model.position="mine/p.py:Part"'),
            ],
            "commit": "abc",
            "dataset": {"folder": "data/x", "classes": ["a"], "fingerprint": "sha256:1"},
        }
    )
    with pytest.raises(RunError, match="no finished epoch yet. .* continue it: python train.py --archive"):
        kept(record)
    record.append_metrics({"epoch": 1, "test_correct": 7})
    (record.folder / "evaluation_test.json").write_text(
        json.dumps(
            dict.fromkeys(("correct", "correct_top5", "seen", "accuracy", "top5_accuracy", "loss", "per_class"), 7)
        )
    )
    content = kept(record, "busy")
    assert content["command"] == [
        *("train.py", "--archive", "cifar100.zip", "--seed", "3", "--stage-to=a=b"),
        *("--set=model.attention=mine.py:Part", "--set", "model.position=p.py:Part"),
    ]
    assert (
        content["metrics"] == [{"epoch": 1, "test_correct": 7}]
        and content["note"] == "busy"
        and content["commit"] == "abc"
    )
    assert content["dataset"] == {"fingerprint": "sha256:1"} and content["evaluated"]["correct"] == 7
    assert "/home" not in json.dumps(content)
