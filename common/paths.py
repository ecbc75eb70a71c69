"""The project's folders and files, independent of the working directory."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
DATA = PROJECT / "data"
RUNS = PROJECT / "runs"
RESULTS = PROJECT / "results"
PRESETS = PROJECT / "presets"
DS_CONFIG = PROJECT / "ds_config.json"
RUNS_OF_COMPARISON = "RUNS_OF_COMPARISON"  # variable by which compare.py tells its runs the folder of their index


def name_of(folder: str | os.PathLike[str]) -> str:
    """Return the name of a folder, also of `.` and `..`; a link has its own name."""
    return os.path.basename(os.path.abspath(folder))


def near_path(path: str | os.PathLike[str]) -> str:
    """Return a path for the screen: relative to the current folder if it lies inside, else absolute."""
    here = os.path.relpath(path)
    return os.path.abspath(path) if here.split(os.sep)[0] == os.pardir else here
