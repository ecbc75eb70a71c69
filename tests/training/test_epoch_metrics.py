"""training/epoch_metrics.py: units of the memory; test_train.py reads the lines that runs write."""

from __future__ import annotations

import resource
from types import SimpleNamespace

import torch

from training.epoch_metrics import peak_memory_gib


def test_peak_memory_is_in_gib_on_a_gpu_and_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)  # bytes
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5 * 2**20))  # KiB
    assert peak_memory_gib(torch.device("cuda")) == 3.0 and peak_memory_gib(torch.device("cpu")) == 5.0
