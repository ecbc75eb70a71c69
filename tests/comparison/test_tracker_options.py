"""compare.py --wandb and --mlflow: what the runs get, and the sentence where a package is missing."""

from __future__ import annotations

from argparse import Namespace

import pytest

from common.errors import SettingsError
from comparison.planned_run import PlannedRun
from comparison.tracker_options import tracker_words, with_trackers


def test_runs_log_to_the_trackers_in_the_group_of_their_variant(monkeypatch, tmp_path):
    monkeypatch.setattr("common.packages.is_installed", lambda package: True)
    tasks = [PlannedRun(f"{name}-seed0", tmp_path, ["--seed", "0"], {}, name) for name in ("mlp", "geglu")]
    logged = with_trackers(tasks, Namespace(wandb="mine", mlflow=""), "pairs")
    for task, group in zip(logged, ("pairs/mlp", "pairs/geglu"), strict=True):
        assert task.arguments == ["--seed", "0", "--wandb", "mine", "--mlflow", "--group", group]
    assert with_trackers(tasks, Namespace(wandb=None, mlflow=None), "pairs") == tasks


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr("common.packages.is_installed", lambda package: False)
    sentence = "^--wandb needs the package wandb, which is not installed: pip install wandb$"
    with pytest.raises(SettingsError, match=sentence):
        tracker_words(Namespace(wandb="", mlflow=None), "pairs/mlp")
