"""Command, commit and versions: what a reader needs to run this again."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from common.paths import PROJECT


def provenance() -> dict[str, Any]:
    """Command, commit and versions: what a reader needs to run this again."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(PROJECT), *words], capture_output=True, text=True).stdout.strip()

    packages = (
        "torch",
        "torchvision",
        "deepspeed",
        "torchft",
        "numpy",
        "nvidia-dali-cuda130",
        "nvidia-dali-cuda120",
        "nvidia-dali-cuda110",
    )
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "versions": versions,
    }
