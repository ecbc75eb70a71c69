"""training/epoch_metrics.py: units of the memory; test_train.py reads the lines that runs write."""

from __future__ import annotations

import resource
from types import SimpleNamespace

import torch

from records.run_folder import Progress
from training.epoch_metrics import epoch_line, peak_memory_gib


def test_an_epoch_of_skipped_steps_has_no_loss():
    """A mean of 0 would be the best of all."""
    engine = SimpleNamespace(
        step=3,
        settings=SimpleNamespace(engine={"optimizer": {"params": {"lr": 1e-3}}}),
        schedule=lambda step: 1.0,
        mean=float,
        device=torch.device("cpu"),
        epoch_facts=dict,
    )
    skipped = epoch_line(engine, Progress(skipped_steps=3), {}, 0.0, False)
    assert skipped["skipped_steps"] == 3 and "train_loss" not in skipped
    assert epoch_line(engine, Progress(loss_sum=3.0, num_losses=2), {}, 0.0, False)["train_loss"] == 1.5


def test_peak_memory_is_in_gib_on_a_gpu_and_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)  # bytes
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5 * 2**20))  # KiB
    assert peak_memory_gib(torch.device("cuda")) == 3.0 and peak_memory_gib(torch.device("cpu")) == 5.0
