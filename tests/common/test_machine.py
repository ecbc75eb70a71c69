"""common/machine.py: which processes exist."""

from __future__ import annotations

import os

import pytest

from common.machine import is_alive


@pytest.mark.parametrize(("error", "expected"), [(ProcessLookupError, False), (PermissionError, True)])
def test_a_process_of_another_user_is_alive(error, expected, monkeypatch):
    def kill(process, number):
        raise error

    assert is_alive(os.getpid())
    monkeypatch.setattr("os.kill", kill)
    assert is_alive(1) is expected
