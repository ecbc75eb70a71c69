"""comparison/planning.py: how runs are divided into shards, and which images a folder gives."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from comparisons import COMMON, VARIANTS

from common.errors import DatasetError, SettingsError
from common.paths import near_path
from comparison.experiment_file import read
from comparison.planning import Data, dataset_facts, plan, share


@pytest.mark.parametrize("variants", range(2, 13))
def test_shards_are_equal_and_none_makes_all_runs_of_a_variant(variants):
    experiment: Any = SimpleNamespace(variants=[SimpleNamespace(name=f"v{i}") for i in range(variants)])
    for count in range(2, 13):
        for seeds in range(2, 6):
            tasks: Any = {(one.name, seed): None for one in experiment.variants for seed in range(seeds)}
            shards = [list(share(experiment, tasks, (i, count))) for i in range(1, count + 1)]
            assert sorted(key for keys in shards for key in keys) == sorted(tasks)
            sizes = [len(keys) for keys in shards]
            assert max(sizes) - min(sizes) <= 1
            for one in experiment.variants:
                assert all(sum(name == one.name for name, _ in keys) < seeds for keys in shards), (count, seeds)


@pytest.mark.parametrize("interval", ["", "2steps"])
def test_an_interval_of_evaluations_goes_to_every_run(tmp_path, tiny, interval):
    (tmp_path / "tiny.toml").write_text(tiny.read_text())
    text = f'evaluate_every = "{interval}"\n' if interval else ""
    (tmp_path / "gates.toml").write_text(text + COMMON + VARIANTS)
    tasks = plan(read(tmp_path / "gates.toml"), Data(tmp_path, 270, 10, 32, None), tmp_path, {"plain": 6, "gated": 6})
    commands = [" ".join(task.arguments) for task in tasks.values()]
    assert len(commands) == 4 and all(("--evaluate-every" in command) == bool(interval) for command in commands)
    assert all(f"--evaluate-every {interval}" in command for command in commands if interval)


def test_a_tree_of_the_users_own_images_is_prepared_in_place_and_not_replaced_by_the_dataset(tree, capsys):
    experiment: Any = SimpleNamespace(dataset="cifar100", hold_out=0.0)
    facts = dataset_facts(experiment, tree, is_dry_run=False)
    assert facts.folder == tree and facts.num_classes == 2 and facts.num_train == 6 and facts.image_side == 16
    assert json.loads((tree / "prepared_from.json").read_text()) == {"root": tree.name}
    assert dataset_facts(experiment, tree, is_dry_run=False) == facts
    assert f"data      {near_path(tree)}: 2 classes, 6 training images\n" in capsys.readouterr().out


def test_a_mistyped_folder_is_refused_and_not_made_the_dataset_of_the_experiment(tmp_path):
    experiment: Any = SimpleNamespace(dataset="shapes", hold_out=0.0)
    with pytest.raises(DatasetError, match="pest holds neither a prepared dataset nor images .*Check the path"):
        dataset_facts(experiment, tmp_path / "pest", is_dry_run=False)
    assert not (tmp_path / "pest").exists()


def test_a_dataset_may_be_the_name_of_a_prepared_folder_of_ones_own_images(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr("comparison.planning.DATA", tmp_path)
    experiment: Any = SimpleNamespace(dataset="pets", hold_out=0.0)
    with pytest.raises(SettingsError, match="'pets' is none of cifar100, .* and .*pets is not prepared; prepare it"):
        dataset_facts(experiment, None, is_dry_run=True)
    (tmp_path / "pets").symlink_to(shapes)
    assert dataset_facts(experiment, None, is_dry_run=False).num_classes == 10
