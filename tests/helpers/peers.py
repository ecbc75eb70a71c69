"""Facts of a run as in run.json, and free ports for peers."""

from __future__ import annotations

import socket

from common.machine import free_port
from config.settings import resolve


def facts_for(*overrides: str) -> dict:
    return {
        "command": ["train.py", "--host-peers", "10.0.0.1", "--set", "a=1", "--name=x", "--fresh", "--epochs", "3"],
        "preset": "cpu",
        "settings": resolve(None, list(overrides)).as_dict(),
        "dataset": {"fingerprint": "f"},
        "seed": 0,
        "max_steps": None,
        "hold_out": None,
        "init_weights": None,
        "synthetic": False,
        "steps_per_epoch": 4,
        "total_steps": 8,
    }


def free_pair() -> int:
    """A free port whose successor is free as well."""
    while True:
        port = free_port()
        with socket.socket() as two:
            try:
                two.bind(("127.0.0.1", port + 1))
                return port
            except OSError:
                continue
