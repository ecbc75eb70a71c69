"""comparison/tuning_runs.py: when tuning changes the network; test_tuned_comparison.py runs it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from comparison.tuning_runs import changes_network


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["optimizer.params.lr"], False),
        (["optimizer.params.lr", "model.width"], True),
        (["model.width", "loss.label_smoothing"], True),
        (["optimizer.type"], True),
        (["image_side"], True),
        (["loss.label_smoothing", "optimizer.params.weight_decay"], False),
    ],
)
def test_one_key_of_the_network_is_enough_to_change_it(keys, expected):
    assert changes_network(SimpleNamespace(keys=keys)) is expected
