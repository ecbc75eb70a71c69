"""The CPU, the GPUs, the processes and the ports of this machine, without loading PyTorch."""

from __future__ import annotations

import os
import platform
import random
import re
import socket
import subprocess
from pathlib import Path

FIRST_PORT, NUM_PORTS = 20000, 12000  # below 32768, so that no outgoing connection uses them


def visible_gpus() -> list[str]:
    """Return the GPUs that the launcher would use, found as the launcher finds them."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    except OSError:
        return []
    found = [str(i) for i in range(len(re.findall(r"^GPU ", listed, re.MULTILINE)))]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not found or chosen is None:
        return found
    return [] if chosen.strip() in ("", "-1") else re.split(r"[ ,]+", chosen.strip())


def cpu_name() -> str:
    """Return the model of this machine's CPU; libraries choose kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def is_alive(process: int) -> bool:
    """Return whether a process with this number exists, whoever started it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


def free_port() -> int:
    """Return a TCP port that nothing listens on, drawn below those of outgoing connections.

    Between this answer and its use, nothing but such another draw can take it.
    """
    while True:
        with socket.socket() as free:
            port = FIRST_PORT + random.SystemRandom().randrange(NUM_PORTS)
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
