"""benchmarks/activation_memory.py: the gradients of both are compared, memory falls, and the table has the ratios."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from benchmarks.activation_memory import measure, rows
from common.errors import RunError
from models import activation_checkpointing

DEEP = """
[model]
patch = 8
width = 32
depth = 8
heads = 2
head_size = 16
feed_forward = "mlp"
feed_forward_options = { hidden = 64 }
dropout = 0.1
"""
OPTIONS = Namespace(side=32, bf16=False, rounds=1)


@pytest.fixture
def deep(tmp_path) -> str:
    (tmp_path / "deep.toml").write_text(DEEP)
    return str(tmp_path / "deep.toml")


def test_memory_falls_and_the_table_has_the_ratio(deep):
    found = measure(deep, torch.randn(8, 3, 32, 32), OPTIONS)
    assert 0 < found["on"]["peak_mib"] < 0.7 * found["off"]["peak_mib"]
    assert len(found["off"]["seconds"]) == len(found["on"]["seconds"]) == 1
    table = rows({"presets": {"x": {**found, "off": {"peak_mib": 40.0, "seconds": [1.0]}, "on": {
        "peak_mib": 10.0, "seconds": [1.5]}}}})  # fmt: skip
    assert table[1][2:] == ["40", "10", "0.25", "1.000", "1.500", "1.50"]


def test_other_gradients_end_the_measurement(deep, monkeypatch):
    def with_other_masks(function, x, **_):
        torch.rand(1)
        return function(x)

    monkeypatch.setattr(activation_checkpointing, "checkpoint", with_other_masks)
    with pytest.raises(RunError, match="gradients with and without checkpointing differ"):
        measure(deep, torch.randn(8, 3, 32, 32), OPTIONS)
