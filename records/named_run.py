"""Run folders as a user names them: a path, the name of a run, or nothing for the newest run."""

from __future__ import annotations

import difflib
from pathlib import Path

from common.errors import RunError
from records.run_folder import METRICS, newest_run


def find_run(name: Path | None, runs: Path, needed: str = METRICS) -> Path:
    """Return the folder of a run: the path itself, `runs/<name>`, or the newest run where `name` is None.

    Args:
        needed: file of the run folder that the newest run should have.

    Raises:
        RunError: there is no such run, but one of a similar name, or `name` is None and there is no run at all.
    """
    if name is None:
        return newest_run(runs, needed)
    if found := existing_run(name, runs):
        return found
    if not name.exists():
        known = sorted(path.parent.name for path in runs.glob("*/run.json"))
        near = difflib.get_close_matches(name.name, known, n=1)
        if near:
            raise RunError(f"there is no run '{name}'. Did you mean {runs / near[0]}?")
    return name


def existing_run(folder: Path, runs: Path) -> Path | None:
    """Return `folder` or `runs/<folder>`, the first that is a run folder; None where neither is."""
    candidates = [folder, runs / folder]  # an absolute path stays itself
    return next((candidate for candidate in candidates if (candidate / "run.json").is_file()), None)
