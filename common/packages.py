"""Whether an optional package is installed, without importing it."""

from __future__ import annotations

import importlib.util


def is_installed(package: str) -> bool:
    """Return whether a package, such as nvidia.dali, is installed; only the parents of a dotted name are imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the parent of a dotted name
        return False
