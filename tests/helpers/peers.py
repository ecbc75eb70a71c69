"""Facts of a run as in run.json, and free ports for peers."""

from __future__ import annotations

import socket
import time

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


def wait_for_pair(port: int, seconds: float = 20.0) -> None:
    """Wait until nothing listens on a port and its successor: torchft's lighthouse closes its own in the background."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as one, socket.socket() as two:
            try:
                for i, probe in enumerate((one, two)):
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port + i))
                    probe.listen()
                return
            except OSError:
                time.sleep(0.05)
    raise AssertionError(f"port {port} or {port + 1} is still in use after {seconds:g} s")
