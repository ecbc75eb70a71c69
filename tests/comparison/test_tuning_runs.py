"""comparison/tuning_runs.py: when tuning changes the network, and what it costs; test_tuned_comparison.py runs it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from comparison.run_costs import RunCost
from comparison.tuning_runs import changes_network


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["optimizer.params.lr"], False),
        (["optimizer.params.lr", "model.width"], True),
        (["model.width", "loss.label_smoothing"], True),
        (["optimizer.type"], True),
        (["image_side"], True),
        (["resizing.fraction"], True),
        (["resizing.initial_scale"], True),
        (["loss.label_smoothing", "optimizer.params.weight_decay"], False),
    ],
)
def test_one_key_of_the_network_is_enough_to_change_it(keys, expected):
    assert changes_network(SimpleNamespace(keys=keys)) is expected


def test_the_cost_of_several_runs_is_a_multiple_also_where_a_part_of_it_is_unknown():
    assert RunCost(1, 100, 0.5) * 6 == RunCost(6, 600, 3.0)
    assert RunCost(1, None, 0.5) * 2 == RunCost(2, None, 1.0) and RunCost(1, 100, None) * 2 == RunCost(2, 200, None)
