"""training/run_facts.py: what run.json says of the machine.

Run: python -m pytest tests/training/test_run_facts.py
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from config.settings import resolve
from image_data.dataset import Dataset
from parallel.batch_sizes import BatchSizes
from training import run_facts
from training.run_facts import RunOptions, facts_of


def test_all_processes_count_also_those_that_share_a_batch(shapes, monkeypatch):
    """A pipeline of four stages is one data shard on four processes."""
    settings = resolve("cpu-quick", ["parallel.stages=4"], strategy="pipeline")
    engine = SimpleNamespace(
        settings=settings,
        device=torch.device("cpu"),
        precision="fp32",
        num_parameters=1,
        data_shard=(0, 1),
        batch_sizes=BatchSizes.derive(settings.engine, 1),
    )
    monkeypatch.setattr(run_facts.dist, "get_world_size", lambda: 4)
    options = RunOptions("cpu-quick", 0, None, None, None, None, False, False)
    facts = facts_of(options, Dataset.open(shapes), shapes, engine, "tensor", 1, 1)
    assert facts["num_processes"] == 4
