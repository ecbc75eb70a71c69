"""parallel/rank_store.py: where the processes of a job meet; several hosts are in tests/cluster."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from parallel import rank_store


class Store:
    """Stands for a TCPStore and keeps what it was made with."""

    def __init__(self, *arguments, **keywords):
        """master_listen_fd: PyTorch's store names it in this text."""
        self.arguments = arguments


@pytest.mark.parametrize(
    ("given", "used"), [("localhost", "127.0.0.1"), ("192.0.2.7", "192.0.2.7"), ("node1", "node1")]
)
def test_a_process_meets_at_the_loopback_interface_only_if_the_job_does(monkeypatch, given, used):
    monkeypatch.setattr(dist, "TCPStore", Store)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.delenv("RENDEZVOUS_SECRET", raising=False)
    for name, value in {"MASTER_ADDR": given, "MASTER_PORT": "1234", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert rank_store.make_store(timedelta(seconds=1)).arguments[:4] == (used, 1234, 2, False)
