"""The project's folders and files, independent of the working directory."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
DATA = PROJECT / "data"
RUNS = PROJECT / "runs"
RESULTS = PROJECT / "results"
PRESETS = PROJECT / "presets"
DS_CONFIG = PROJECT / "ds_config.json"
