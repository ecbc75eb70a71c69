"""Facts of a run that its main process prints for the launcher of several hosts, which reads and hides them."""

from __future__ import annotations

import json
import os
from pathlib import Path

MARK = "facts for the launcher: "


def print_launch_facts(folder: Path, batch: tuple[int, int, int]) -> None:
    """Print the facts if cluster/agent.py started this process; `batch` is global batch, accumulation steps, shards."""
    if "CLUSTER_JOB" in os.environ:
        print(MARK + json.dumps([str(folder.absolute()), batch]), flush=True)


def launch_facts_in(line: str) -> tuple[str, tuple[int, int, int]] | None:
    """Return run folder and batch if the line holds them."""
    if not line.startswith(MARK):
        return None
    folder, (total, accumulation, shards) = json.loads(line.removeprefix(MARK))
    return folder, (total, accumulation, shards)
