"""Facts of a run that its main process gives to its launcher.

The launcher of several hosts reads and hides the printed ones.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

MARK = "facts for the launcher: "


def print_launch_facts(folder: Path, batch: tuple[int, int, int]) -> None:
    """Print the facts if cluster/agent.py started this process; `batch` is global batch, accumulation steps, shards.

    For cluster/slurm/ranks.sh, make the file that RUN_BEGUN names.
    """
    if "CLUSTER_JOB" in os.environ:
        print(MARK + json.dumps([str(folder.absolute()), batch]), flush=True)
    if begun := os.environ.get("RUN_BEGUN"):
        Path(begun).touch()


def launch_facts_in(line: str) -> tuple[str, tuple[int, int, int]] | None:
    """Return run folder and batch if the line holds them."""
    if not line.startswith(MARK):
        return None
    folder, (total, accumulation, shards) = json.loads(line.removeprefix(MARK))
    return folder, (total, accumulation, shards)
