"""The project's own files, without what a user adds to its folder: `mine.py`, `venv/`, data, runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from common.paths import PROJECT

NOT_PROJECT = {"data", "runs", "__pycache__"}


def project_files(*suffixes: str) -> list[str]:
    """Return the paths of all files with one of these suffixes (none: of all files), relative to the project.

    They are those that git tracks, or in a copy without git all that are in no hidden folder and no environment.
    """
    try:
        done = subprocess.run(["git", "-C", PROJECT, "ls-files", "-z"], capture_output=True, text=True)
        names = [name for name in done.stdout.split("\0") if name and (PROJECT / name).is_file()]
    except OSError:  # no git
        names = []
    return sorted(name for name in names or _walk() if not suffixes or Path(name).suffix in suffixes)


def _walk() -> list[str]:
    found = []
    for folder, folders, files in os.walk(PROJECT):
        inside = Path(folder).relative_to(PROJECT)
        if "pyvenv.cfg" in files:
            folders.clear()
            continue
        folders[:] = [name for name in folders if name[0] != "." and name not in NOT_PROJECT]
        found += [str(inside / name) for name in files]
    return found
