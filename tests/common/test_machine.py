"""common/machine.py: which processes exist, and which ports are free."""

from __future__ import annotations

import os
import socket

import pytest

from common.machine import free_port, is_alive


@pytest.mark.parametrize(("error", "expected"), [(ProcessLookupError, False), (PermissionError, True)])
def test_a_process_of_another_user_is_alive(error, expected, monkeypatch):
    def kill(process, number):
        raise error

    assert is_alive(os.getpid())
    monkeypatch.setattr("os.kill", kill)
    assert is_alive(1) is expected


def test_a_free_port_is_below_those_of_outgoing_connections_and_one_in_use_is_not_taken(monkeypatch):
    with socket.socket() as used:
        port = free_port()
        used.bind(("127.0.0.1", port))
        offsets = iter([port - 20000, 1])
        monkeypatch.setattr("random.SystemRandom.randrange", lambda *_: next(offsets, 2))
        assert port < 32768 and free_port() in (20001, 20002)
