"""parallel/collectives.py: what several processes exchange, and that one process exchanges nothing."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from programs import run_ranks

from parallel import process_group
from parallel.collectives import Collectives


def exchange() -> None:
    process_group.init_process_group()
    rank, own = dist.get_rank(), Collectives()
    assert own.any_flags(rank == 1, False, True) == [True, False, True] and own.any(rank == 0)
    assert own.mean(torch.tensor(float(rank))) == 0.5
    assert own.broadcast_object({"rank": rank}) == {"rank": 0}
    assert own.all_gather_objects(rank) == [0, 1]
    assert own.own_value([3.0, 5.0]) == [3.0, 5.0][rank] and own.own_value([1.0, 2.0, 6.0]) == 3.0
    dist.destroy_process_group()


def test_two_processes_exchange_flags_numbers_and_objects():
    run_ranks(2, exchange)


def test_one_process_sends_nothing(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)  # and no group to send to
    own = Collectives()
    assert own.any_flags(True, False) == [True, False] and own.mean(torch.tensor(2.5)) == 2.5
    assert own.broadcast_object("kept") == "kept"


@pytest.mark.parametrize(("address", "interface"), [("127.0.0.1", "lo"), ("localhost", "lo"), ("192.0.2.7", None)])
def test_a_meeting_on_this_machine_uses_its_loopback_interface(monkeypatch, address, interface):
    monkeypatch.setenv("MASTER_ADDR", address)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    monkeypatch.setattr(process_group, "make_store", lambda limit: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *words, **numbers: None)
    process_group._join(torch.device("cpu"), 1.0)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == os.environ.get("NCCL_SOCKET_IFNAME") == interface
