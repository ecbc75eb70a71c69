"""What this machine is: its processor and its GPUs, without loading PyTorch."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path


def visible_gpus() -> list[str]:
    """The GPUs that the launcher would use, found as it finds them: without loading PyTorch."""
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
    """The model of this machine's processor: another one may choose other kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
